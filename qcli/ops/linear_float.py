"""Linear layer with an unquantized weight, for few tokens: y = x W^T + bias, with W float32, bfloat16 or float16.

torch's product rounds x to the weight's dtype and may convert the weight. This one reads the weight once, as it is stored, and
widens it on the way. Products and sums are float32, and y is rounded once to x's dtype.
"""

import torch

from qcli.ops._library import define
from qcli.runtime import cpu

_ROWS = 4096  # rows of the weight in float32 at a time


def _reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1]).float()
    y = torch.cat([rows @ part.float().t() for part in weight.split(_ROWS)], 1)
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _fake(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_kernel = cpu.kernel("linear_float", "piqpp")


class PreparedFloat:
    """A weight, checked and prepared for the CPU kernel for few tokens. It raises the same errors as the op."""

    MOST_TOKENS = 16
    STEP = "linear_float_step"

    def __init__(self, in_features: int, weight: torch.Tensor, bias: torch.Tensor | None):
        op, self.in_features, self.out_features = "linear_float", in_features, weight.shape[0]
        weight = cpu.require(op, "weight", weight, weight.dtype, self.out_features * in_features)
        dtypes = [cpu.dtype_code(op, weight, "weight"), 0]
        if bias is not None:
            bias = cpu.require(op, "bias", bias, bias.dtype, self.out_features)
            dtypes[1] = cpu.dtype_code(op, bias, "bias")
        self.weight = cpu.Record("pqpqqq", weight, dtypes[0], bias, dtypes[1], self.out_features, in_features)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] to [..., out_features]."""
        y = x.new_empty((*x.shape[:-1], self.out_features))
        tokens = x.numel() // self.in_features
        _kernel(x.contiguous(), cpu.dtype_code("linear_float", x), tokens, self.weight.address, y)
        return y


def _cpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    in_features = x.shape[-1]
    if not x.numel() or x.numel() > PreparedFloat.MOST_TOKENS * in_features:
        return _reference(x, weight, bias)
    return PreparedFloat(in_features, weight, bias)(x)


_op = define("linear_float(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _reference, _fake, _cpu)


def linear_float(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., in_features], weight [out_features, in_features], bias [out_features] or None; each float32, bfloat16 or float16.

    Returns [..., out_features] in x's dtype. A kernel runs on a CPU for up to 16 tokens. Raises TypeError for another dtype, and
    ValueError for sizes that do not fit.
    """
    return _op(x, weight, bias)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for stored in (torch.float32, torch.bfloat16, torch.float16):
            for shape, out_features in (((1, 576), 33), ((5, 70), 9), ((2, 3, 1040), 130), ((7, 16), 3)):
                x = torch.randn(shape, generator=generator).to(dtype)
                weight = torch.randn(out_features, shape[-1], generator=generator).to(stored)
                bias = torch.randn(out_features, generator=generator).to(stored) if len(shape) > 2 else None
                name = f"{str(dtype)[6:]}-{str(stored)[6:]}-{'x'.join(map(str, shape))}x{out_features}"
                yield name, {"x": x, "weight": weight, "bias": bias}
