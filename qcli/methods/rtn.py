"""Round to nearest: integer codes in groups of a row, symmetric or with a zero point. The baseline of every calibrated method.

The arithmetic is that of compressed-tensors. With b bits, codes lie in [-2^(b-1), 2^(b-1) - 1], and the range of a group holds 0:
  symmetric    scale = max|w| / ((2^b - 1) / 2)
  zero point   scale = (max - min) / (2^b - 1),  zero_point = round(-2^(b-1) - min / scale)
A code is round(w / scale) + zero_point, halves to even, clamped. It stands for (code - zero_point) * scale, a product in the dtype
of the scale. The scale is rounded to the model's dtype first, since that is what is stored. A group of zeros has the scale eps.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from qcli.errors import UsageError
from qcli.methods._method import Method, Parts
from qcli.methods.errors import ErrorSums, add_up
from qcli.schemes import NAMED, Scheme

_BITS = (4, 8)
_GROUP_SIZES = (32, 64, 128, 256)


@dataclass(frozen=True)
class RoundToNearest:
    """`bits` of a code, `group_size` elements of a row that share a scale, and whether a group has a zero point too."""

    bits: int = 4
    group_size: int = 128
    zero_point: bool = False

    casts_to_model_dtype: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value, allowed in (("bits", self.bits, _BITS), ("group_size", self.group_size, _GROUP_SIZES)):
            if value not in allowed:
                raise UsageError(f"{name} is {value}, expected one of {', '.join(map(str, allowed))}")

    @property
    def scheme(self) -> Scheme:
        """What a weight is stored as with these options."""
        return replace(NAMED["rtn"], bits=self.bits, size=self.group_size, zero_point=self.zero_point)

    @classmethod
    def of(cls, scheme: Scheme) -> Self:
        """The method with the options that make `scheme`."""
        return cls(scheme.bits, scheme.size, scheme.zero_point)

    def encoder(self, out_features: int, in_features: int, device: torch.device) -> "_Encoder":
        """Takes one weight of this shape."""
        return _Encoder(self, out_features, in_features, device)

    def decode(self, parts: Parts, out_features: int, in_features: int) -> torch.Tensor:
        """The weight float32 [out_features, in_features] that all parts together stand for."""
        codes = parts["codes"].view(out_features, in_features)
        return values_of(codes, parts["scale"], parts.get("zero_point"), self.group_size).float()


def values_of(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, group_size: int) -> torch.Tensor:
    """(code - zero_point) * scale for codes int8 [rows, in_features], in the dtype of scale [rows, groups]."""
    grouped = codes.unflatten(-1, (-1, group_size))
    if zero_point is not None:
        grouped = grouped.to(torch.int16) - zero_point.unsqueeze(-1)
    values: torch.Tensor = grouped.to(scale.dtype) * scale.unsqueeze(-1)
    return values.flatten(-2)


class _Encoder:
    """See qcli.methods._method.Encoder. Takes whole rows."""

    def __init__(self, method: RoundToNearest, out_features: int, in_features: int, device: torch.device):
        self.method, self.grain = method, in_features
        shape = out_features, -(-in_features // method.group_size)
        self.scale = torch.empty(shape, device=device)
        self.zero_point = torch.empty(shape, dtype=torch.int8, device=device) if method.zero_point else None
        self.dtype = torch.float32
        self.sums: dict[int, list[float]] = {}

    def feed(self, chunk: torch.Tensor, start: int) -> Parts:
        method, self.dtype = self.method, chunk.dtype
        rows = chunk.view(-1, self.grain)
        groups = rows.float().unflatten(-1, (-1, method.group_size))
        least, most = -(2 ** (method.bits - 1)), 2 ** (method.bits - 1) - 1
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = (high - low) / (most - least) if method.zero_point else torch.maximum(-low, high) / ((most - least) / 2)
        scale = scale.to(chunk.dtype)
        scale = torch.where(scale == 0, torch.finfo(chunk.dtype).eps, scale)
        zero_point = None
        if method.zero_point:
            zero_point = (least - low / scale.float()).round_().clamp_(least, most).nan_to_num_(0.0).to(torch.int8)
        shift = 0 if zero_point is None else zero_point.unsqueeze(-1)
        codes = (groups / scale.float().unsqueeze(-1)).round_().add_(shift).clamp_(least, most).nan_to_num_(0.0)
        codes = codes.to(torch.int8).flatten(-2)
        self._note(rows.float(), values_of(codes, scale, zero_point, method.group_size).float(), start)
        place = slice(start // self.grain, start // self.grain + len(rows))
        self.scale[place] = scale.float()
        if self.zero_point is not None and zero_point is not None:
            self.zero_point[place] = zero_point
        return {"codes": codes}

    def finish(self) -> tuple[Parts, ErrorSums]:
        parts = {"scale": self.scale.to(self.dtype)}  # exact: it was rounded to this dtype before it came here
        if self.zero_point is not None:
            parts["zero_point"] = self.zero_point
        return parts, add_up(self.sums)

    def _note(self, rows: torch.Tensor, values: torch.Tensor, start: int) -> None:
        finite = rows.isfinite() & values.isfinite()
        error = (rows - values).masked_fill_(~finite, 0.0).square_().sum(dtype=torch.float64)
        norm = rows.masked_fill(~finite, 0.0).square_().sum(dtype=torch.float64)
        self.sums[start] = [float(error), float(norm), int((~rows.isfinite()).sum())]


METHOD: type[Method] = RoundToNearest
