"""Linear layer of int8 weights and activations as they are (W8A16): nothing of x is rounded, so no column is an outlier.

  y = (x q_w^T) * absmax_w / 127  +  bias

The weight is that of LLM.int8(), read as it is stored: the same bytes per token, and of its two errors only the weight's.
Sums are float32, the step of a row multiplies its sum, and y is rounded once to x's dtype.
"""

import torch

from qcli.ops._library import define
from qcli.ops.quantize_int8 import quantize_int8

_ROWS = 512  # of the weight that are float32 at a time


def _reference(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1]).float()
    y = torch.cat([rows @ part.float().t() for part in weight.split(_ROWS)], 1)
    y.mul_(scale.float() * (1 / 127))
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _fake(x, weight, scale, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_op = define("linear_w8a16(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor", _reference, _fake)


def linear_w8a16(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] float; weight int8 [N, K]; scale float32 [N], its rows' absmax; bias [N] or None. Returns [..., N] in x's
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
