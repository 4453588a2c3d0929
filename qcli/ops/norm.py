"""RMS norm or layer norm of the sum of a residual stream and what a layer adds to it.

  sum = factor x + residual
  y   = sum / sqrt(mean(sum^2) + eps) * weight + bias                    RMS norm (Zhang and Sennrich, 2019)
  y   = (sum - mean(sum)) / sqrt(var(sum) + eps) * weight + bias         layer norm, centered (Ba, Kiros and Hinton, 2016)

All of it is float32. y is rounded to x's dtype, the sum to the residual's.
"""

import torch

from qcli.ops._library import define
from qcli.ops._step import token_rows, token_stride, vector
from qcli.runtime import cpu, cuda


def _reference(x, residual, weight, bias, eps, centered, factor):
    total = x.float().contiguous() * factor
    if residual is not None:
        total = residual.float() + total
    y = total - total.mean(-1, keepdim=True) if centered else total
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype), total.to((x if residual is None else residual).dtype)


def _fake(x, residual, weight, bias, eps, centered, factor):
    return x.new_empty(x.shape), (x if residual is None else residual).new_empty(x.shape)


_kernel = cpu.kernel("norm", "pqq")


def record(
    x: torch.Tensor,
    y: torch.Tensor | None,
    *,
    residual: torch.Tensor | None = None,
    sum: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float,
    centered: bool,
    factor: float = 1.0,
) -> cpu.Record:
    """The record of the CPU kernel: struct Norm of kernels/cpu/norm.cpp. All tensors are float32.

    x and y [tokens, n], or [tokens, rows, n] for a norm of each row, such as each head's. A stride lies between tokens. y may be x,
    or None if only the sum is wanted. residual and sum have the same shape and are contiguous; sum may be the residual, or None.
    weight and bias [n]. Raises TypeError or ValueError.
    """
    op = "norm"
    shape = tuple(x.shape[1:])
    strides = [token_stride(op, "x", x, *shape), 0 if y is None else token_stride(op, "y", y, *shape)]
    n, rows = x.shape[-1], x.shape[1:-1].numel()
    for name, other in (("residual", residual), ("sum", sum)):
        if other is not None and token_stride(op, name, other, *shape) != rows * n:
            raise ValueError(f"{op}: {name} has strides {other.stride()}, expected contiguous tokens")
    weight, bias = vector(op, "weight", weight, n), vector(op, "bias", bias, n)
    return cpu.Record("ppppppqqqqffi", x, residual, weight, bias, sum, y, *strides, rows, n, eps, factor, centered)


def _cpu(x, residual, weight, bias, eps, centered, factor):
    if not x.numel():
        return _reference(x, residual, weight, bias, eps, centered, factor)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"norm: residual is {list(residual.shape)}, expected {list(x.shape)}")
    kept = (x if residual is None else residual).dtype
    rows, added = (None if t is None else t.float().contiguous().view(-1, x.shape[-1]) for t in (x, residual))
    weight, bias = (None if t is None else t.float() for t in (weight, bias))
    y, total = torch.empty_like(rows), torch.empty_like(rows)
    made = record(rows, y, residual=added, sum=total, weight=weight, bias=bias, eps=eps, centered=centered, factor=factor)
    _kernel(made.address, len(rows), 0)
    return y.to(x.dtype).view(x.shape), total.to(kept).view(x.shape)


_kernel_cuda = cuda.kernel("norm", "pqiipifpipifipp", "norm_rows")


def _cuda(x, residual, weight, bias, eps, centered, factor):
    op, n = "norm", x.shape[-1]
    if not x.numel():
        return _reference(x, residual, weight, bias, eps, centered, factor)
    constants = (f"DTYPE={cuda.type_name(op, x)}", f"WARPS={1 if n <= 1024 else 8}")
    if not token_rows(x):
        x = x.contiguous()
    kept = x if residual is None else residual
    cuda.type_name(op, kept, "residual")
    if residual is not None:
        residual = cuda.require(op, "residual", residual, residual.dtype, x.numel(), x.device)
    vectors = []
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None:
            cuda.type_name(op, given, name)
            given = cuda.require(op, name, given, given.dtype, n, x.device)
        vectors += [0, 0] if given is None else [given, cpu.DTYPES[given.dtype]]
    rows = x.shape[1:-1].numel() if x.dim() > 1 else 1
    y, total = x.new_empty(x.shape), kept.new_empty(x.shape)
    stride = x.stride(0) if x.dim() > 1 else n
    added = 0 if residual is None else residual, cpu.DTYPES[kept.dtype]
    _kernel_cuda(
        constants,
        (x.numel() // n,),
        32 if n <= 1024 else 256,
        0,
        x,
        stride,
        rows,
        n,
        *added,
        factor,
        *vectors,
        eps,
        centered,
        y,
        total,
    )
    return y, total


_op = define(
    "norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool centered, float factor) "
    "-> (Tensor y, Tensor sum)",
    _reference,
    _fake,
    _cpu,
    _cuda,
)


def norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    centered: bool,
    factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., n], float32, bfloat16 or float16; residual of x's shape or None; weight and bias [n] or None.

    Returns (y, sum), both of x's shape: y in x's dtype, sum = factor x + residual in the residual's dtype, or in x's without one.
    Raises ValueError for shapes that do not fit.
    """
    return _op(x, residual, weight, bias, eps, centered, factor)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    shapes = (((1, 576), True, True, False), ((3, 5, 64), False, True, False), ((2, 1000), True, False, True))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for centered in (False, True):
            for shape, added, weighted, biased in (*shapes, ((8, 20), False, False, False), ((2, 4103), True, True, True)):
                x, residual = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
                weight, bias = (torch.randn(shape[-1], generator=generator) for _ in range(2))
                yield (
                    f"{str(dtype)[6:]}-{'layer' if centered else 'rms'}-{'x'.join(map(str, shape))}",
                    {
                        "x": x,
                        "residual": (residual.float() if biased else residual) if added else None,
                        "weight": weight.to(dtype) if weighted else None,
                        "bias": bias if biased else None,
                        "eps": 1e-5,
                        "centered": centered,
                        "factor": 0.22 if biased else 1.0,
                    },
                )
