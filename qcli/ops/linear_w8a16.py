"""Linear layer with int8 weights and unquantized activations (W8A16). x is not rounded, so no column is an outlier.

  y = (x q_w^T) * absmax_w / 127  +  bias

The weight is that of LLM.int8(), read as it is stored. The bytes per token are the same; there is the error of the weight, but
none of x. Sums are float32, absmax_w / 127 multiplies the sum, and y is rounded once to x's dtype.
"""

import torch

from qcli.ops._library import blocks, define, persistent_grid
from qcli.ops.dequantize_int8 import dequantize_int8
from qcli.ops.linear_int8 import kernel_arguments
from qcli.ops.quantize_int8 import quantize_int8
from qcli.runtime import cpu, cuda

_ROWS = 512  # rows of the weight in float32 at a time


def _reference(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1]).float()
    y = torch.cat([rows @ part.float().t() for part in weight.split(_ROWS)], 1)
    y.mul_(scale.float() * (1 / 127))
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _fake(x, weight, scale, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_kernel = cpu.kernel("linear_w8a16", "piqpp")


class PreparedW8A16:
    """A weight, checked and prepared for the CPU kernel for few tokens. Its arguments after in_features are those of the op after
    x. It raises the same errors as the op."""

    MOST_TOKENS = 16  # for more tokens, torch's product of a widened weight is faster
    STEP = "linear_w8a16_step"

    def __init__(self, in_features: int, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None):
        op, self.in_features, self.out_features = "linear_w8a16", in_features, weight.shape[0]
        weight = cpu.require(op, "weight", weight, torch.int8, self.out_features * in_features)
        scale = cpu.require(op, "scale", scale.float(), torch.float32, self.out_features)
        if bias is not None:
            bias = cpu.require(op, "bias", bias, bias.dtype, self.out_features)
        dtype = 0 if bias is None else cpu.dtype_code(op, bias, "bias")
        self.weight = cpu.Record("pppqqq", weight, scale, bias, dtype, self.out_features, in_features)
        self.addresses = self.weight.addresses

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] to [..., out_features]."""
        y = x.new_empty((*x.shape[:-1], self.out_features))
        tokens = x.numel() // self.in_features
        _kernel(x.contiguous(), cpu.dtype_code("linear_w8a16", x), tokens, self.weight.address, y)
        return y


def _cpu(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    in_features = x.shape[-1]
    if not in_features or x.numel() > PreparedW8A16.MOST_TOKENS * in_features:
        return _reference(x, weight, scale, bias)
    return PreparedW8A16(in_features, weight, scale, bias)(x)


_FEW = 8  # the most tokens of the CUDA kernel
_kernel_cuda = cuda.kernel("linear_w8a16", "pipppqip")


def _cuda(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    op, (out_features, in_features) = "linear_w8a16", weight.shape
    tokens = x.numel() // in_features if in_features else 0
    if x.dtype == torch.float32 or not tokens or not out_features:
        return _reference(x, weight, scale, bias)
    on_tensor_cores = x.dtype == torch.float16 or cuda.capability(x) >= (8, 0)
    if tokens > _FEW or in_features % 16 or not on_tensor_cores:
        wide = dequantize_int8(weight, scale, x.dtype)
        return torch.nn.functional.linear(x, wide, None if bias is None else bias.to(x.dtype))
    constants, weight, scale, bias = kernel_arguments(op, x, weight, scale, bias)
    y = x.new_empty((*x.shape[:-1], out_features))
    grid = persistent_grid(x, blocks(out_features, 16), 2 * 8 * 8 * 20 * 4)
    _kernel_cuda(
        (*constants, f"FULL={int(in_features % 256 == 0)}"),
        grid,
        256,
        0,
        cuda.aligned(x),
        tokens,
        weight,
        scale,
        bias,
        out_features,
        in_features,
        y,
    )
    return y


_op = define("linear_w8a16(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor", _reference, _fake, _cpu, _cuda)


def linear_w8a16(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] float; weight int8 [N, K]; scale float32 [N], the absmax of its rows; bias [N] or None. Returns [..., N] in x's
    dtype."""
    return _op(x, weight, scale, bias)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape, out_features in (((1, 128), 48), ((5, 70), 33), ((2, 65, 64), 16), ((3, 1040), 520)):
            weight, scale, _ = quantize_int8(torch.randn(out_features, shape[-1], generator=generator), 0.0)
            x = torch.randn(shape, generator=generator)
            x[..., 5] *= 30
            bias = torch.randn(out_features, generator=generator).to(dtype) if len(shape) > 2 else None
            name = f"{str(dtype)[6:]}-{'x'.join(map(str, shape))}x{out_features}"
            yield name, {"x": x.to(dtype), "weight": weight, "scale": scale, "bias": bias}
    large = torch.randn(3, 1040, generator=generator)
    large[:, 7] = 2e5
    large[1] = 0
    yield "beyond-float16", {"x": large.bfloat16(), "weight": weight, "scale": scale, "bias": None}
