"""Zeropoint int8 (arXiv:2208.07339, section 2): the whole range of int8 for values that are not centred on zero.

With nd = 2 * 127 / (max - min) and an integer zero point, q = round(nd * x) - zp fills [-127, 127], and stands for
(q + zp) / nd, which is round(nd * x) / nd. The paper's formula for zp, round(x * min), is read as round(nd * min) + 127: the
shift that takes the least value to -127. Products add zp to q before they multiply, so nothing more is rounded.

Where all values are equal the range is zero; they are kept, the limit of a range that shrinks.
"""

from dataclasses import dataclass
from math import prod

import torch

from qcli.simulation._base import Prepared, Simulation


def round_rows(x: torch.Tensor) -> torch.Tensor:
    """x float32 [..., columns] with a scale and a zero point for each row."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)  # apart: on a CPU a tenth of the time of aminmax
    span = high - low
    flat = span == 0
    # Divided by the range first: 254 / range overflows for a small one. Without a range every level is 0, and stands for x.
    divisor = span.masked_fill(flat, torch.inf)
    levels, least = (x / divisor).mul_(254).round_(), (low / divisor).mul_(254).round_()
    levels.clamp_(least, least + 254)  # where float32 rounds both ends apart
    return levels.mul_(span / 254).add_(low.masked_fill(~flat, 0.0))


def round_tensor(x: torch.Tensor) -> torch.Tensor:
    """x float32 [..., rows, columns] with a scale and a zero point for each matrix."""
    return round_rows(x.flatten(-2)).view(x.shape)


@dataclass(frozen=True)
class Zeropoint(Simulation):
    """One scale and zero point for X and one for W, or one for each token and each output row."""

    name: str
    vectors: bool

    def weight(self, weight: torch.Tensor) -> Prepared:
        rounding = round_rows if self.vectors else round_tensor
        return Prepared(rounding(weight.float()), rounding)

    def stored_bytes(self, shape: tuple[int, int], dtype: str = "BF16", outlier_columns: int = 0) -> int:
        return prod(shape) + (shape[0] if self.vectors else 1) * 8  # float32 scale, int32 zero point


SIMULATIONS = (Zeropoint("int8 zeropoint", vectors=False), Zeropoint("int8 zeropoint vector-wise", vectors=True))
