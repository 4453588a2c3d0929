"""LLM.int8() (arXiv:2208.07339, equation 8): int8 product of what is ordinary, 16-bit product of the outlier columns.

  y = int32(q_x q_w^T) * absmax_x * absmax_w / 127^2  +  x[:, outliers] W[:, outliers]^T  +  bias

A column of x is an outlier where any |x| >= threshold in this call; row absmax excludes those elements. W's outlier columns
are its dequantized int8 columns, as in bitsandbytes; nothing more is stored. Any activation dtype: nothing passes through
float16, sums are float32, and y is rounded once. bitsandbytes casts x to float16 first, and the constant of its CPU path
exceeds 1/127^2 by 1.8e-5.
"""

from functools import cache

import torch

from qcli.ops._library import define
from qcli.ops.dequantize_int8 import dequantize_int8
from qcli.ops.quantize_int8 import quantize_int8

_EXACT_IN_FLOAT32 = 1024  # products of int8 that float32 adds without rounding: 1024 * 127^2 < 2^24


def _reference(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, threshold: float
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    q, absmax, outliers = quantize_int8(rows, threshold)
    y = int8_product(q, weight).float() * (absmax.unsqueeze(1) * scale.float().unsqueeze(0) * (1 / 127**2))
    columns = outliers.nonzero().view(-1)
    if columns.numel():
        kept = dequantize_int8(weight[:, columns], scale, x.dtype)
        y += rows[:, columns].float() @ kept.float().t()
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def int8_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a int8 [M, K] times b int8 [N, K] transposed, exactly, as int32 [M, N]."""
    if a.is_cpu:
        if a.numel() and b.numel() and _int_mm_is_exact():
            return torch._int_mm(a, b.t())
    elif a.shape[0] and b.numel():
        # cuBLASLt takes more than 16 rows, and multiples of 8 in the other two sizes.
        m, n, k = max(a.shape[0], 17) - a.shape[0], -b.shape[0] % 8, -a.shape[1] % 8
        pad = torch.nn.functional.pad
        return torch._int_mm(pad(a, (0, k, 0, m)), pad(b, (0, k, 0, n)).t())[: a.shape[0], : b.shape[0]]
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for left, right in zip(a.split(_EXACT_IN_FLOAT32, 1), b.split(_EXACT_IN_FLOAT32, 1)):
        total += (left.float() @ right.float().t()).to(torch.int32)
    return total


@cache
def _int_mm_is_exact() -> bool:
    """Whether the CPU's int8 product never saturates, which some do on processors without VNNI."""
    extreme = torch.full((32, 256), 127, dtype=torch.int8)
    signs = torch.cat((extreme, -extreme))
    expected = 256 * 127**2
    product = torch._int_mm(signs, signs.t())
    return bool((product[:32, :32] == expected).all() and (product[:32, 32:] == -expected).all())


def _fake(x, weight, scale, bias, threshold):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_op = define(
    "linear_int8(Tensor x, Tensor weight, Tensor scale, Tensor? bias, float threshold) -> Tensor", _reference, _fake
)


def linear_int8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, threshold: float
) -> torch.Tensor:
    """x [..., K] float; weight int8 [N, K]; scale float32 [N], its rows' absmax; bias [N] or None. Returns [..., N]."""
    return _op(x, weight, scale, bias, threshold)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for threshold in (0.0, 6.0):
            for rows, out_features, in_features in ((1, 48, 128), (5, 33, 70), (130, 16, 64)):
                weight, scale, _ = quantize_int8(torch.randn(out_features, in_features, generator=generator), 0.0)
                x = torch.randn(rows, in_features, generator=generator)
                x[:, 5] *= 30
                bias = torch.randn(out_features, generator=generator).to(dtype) if rows > 1 else None
                name = f"{str(dtype)[6:]}-{threshold}-{rows}x{out_features}x{in_features}"
                yield name, {
                    "x": x.to(dtype), "weight": weight, "scale": scale, "bias": bias, "threshold": threshold,
                }  # fmt: skip
