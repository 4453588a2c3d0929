"""Zeropoint int8 (arXiv:2208.07339, section 2): the whole range of int8 for values that are not centred on zero.

With nd = 2 * 127 / (max - min) and an integer zero point, q = round(nd * x) - zp fills [-127, 127], and stands for
(q + zp) / nd, which is round(nd * x) / nd. The paper's formula for zp, round(x * min), is read as round(nd * min) + 127: the
shift that takes the least value to -127. Products add zp to q before they multiply, so nothing more is rounded. (The parts have
the usual sign: a code stands for (code - zero_point) * scale.)

Where all values are equal the range is zero. They are kept, which is the limit of a range that shrinks.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from qcli.methods._method import Method, Parts
from qcli.methods.errors import ErrorSums, add_up
from qcli.schemes import NAMED, Scheme


def levels_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x float32 [..., columns] as round(nd * x), the least of them, and the scale 1 / nd of each row, [..., 1]. A row without a
    range has the level 1 and its value as the scale."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)  # apart: on a CPU a tenth of the time of aminmax
    span = high - low
    flat = span == 0
    # Divided by the range first: 254 / range overflows for a small one.
    divisor = span.masked_fill(flat, torch.inf)
    levels, least = (x / divisor).mul_(254).round_(), (low / divisor).mul_(254).round_()
    levels.clamp_(least, least + 254)  # where float32 rounds both ends apart
    if flat.any():
        levels, least = levels + flat, least + flat
    return levels, least, torch.where(flat, low, span / 254)


def round_rows(x: torch.Tensor) -> torch.Tensor:
    """x float32 [..., columns] with a scale and a zero point for each row, as the values that its codes stand for."""
    levels, _, scale = levels_of(x)
    return levels.mul_(scale)


@dataclass(frozen=True)
class Zeropoint:
    """One scale and zero point for each output row, or one for the whole weight, which is then taken in one chunk."""

    form: str = "zeropoint"

    casts_to_model_dtype: ClassVar[bool] = False
    needs_absmax: ClassVar[bool] = False

    @property
    def scheme(self) -> Scheme:
        """What a weight is stored as."""
        return NAMED[self.form]

    @classmethod
    def of(cls, scheme: Scheme) -> Self:
        """The method in the form of that name."""
        return cls(scheme.name)

    def encoder(self, out_features: int, in_features: int, device: torch.device, absmax: float = 0.0) -> "_Encoder":
        """Takes one weight of this shape."""
        scales = self.scheme.scales(out_features, in_features)
        return _Encoder(scales, out_features * in_features // scales, device)

    def decode(self, parts: Parts, out_features: int, in_features: int) -> torch.Tensor:
        """The weight float32 [out_features, in_features] that all parts together stand for."""
        scale, zero_point = parts["scale"].view(-1, 1), parts["zero_point"].view(-1, 1)
        levels = (parts["codes"].view(len(scale), -1) - zero_point).float()
        return levels.mul_(scale).view(out_features, in_features)


class _Encoder:
    """See qcli.methods._method.Encoder."""

    def __init__(self, rows: int, columns: int, device: torch.device):
        self.grain = columns
        self.scale = torch.empty(rows, device=device)
        self.zero_point = torch.empty(rows, dtype=torch.int64, device=device)
        self.sums: dict[int, list[float]] = {}

    def feed(self, chunk: torch.Tensor, start: int) -> Parts:
        rows = chunk.reshape(-1, self.grain).float()
        levels, least, scale = levels_of(rows)
        values = levels * scale
        finite = rows.isfinite()
        error = (rows - values).masked_fill(~finite, 0.0).double().square().sum()
        norm = rows.masked_fill(~finite, 0.0).double().square().sum()
        self.sums[start] = [float(error), float(norm), int((~finite).sum())]
        place = slice(start // self.grain, start // self.grain + len(rows))
        self.scale[place] = scale.view(-1)
        self.zero_point[place] = (-127 - least).long().view(-1)
        return {"codes": (levels - least - 127).to(torch.int8)}

    def finish(self) -> tuple[Parts, ErrorSums]:
        return {"scale": self.scale, "zero_point": self.zero_point}, add_up(self.sums)


METHOD: type[Method] = Zeropoint
