"""Round to nearest: integer codes in groups of a row, symmetric or with a zero point. The baseline of every calibrated method.

The arithmetic is that of compressed-tensors. With b bits, codes lie in [-2^(b-1), 2^(b-1) - 1], and the range of a group holds 0:
  symmetric    scale = max|w| / ((2^b - 1) / 2)
  zero point   scale = (max - min) / (2^b - 1),  zero_point = round(-2^(b-1) - min / scale)
A code is round(w / scale) + zero_point, halves to even, clamped. It stands for (code - zero_point) * scale, a product in the dtype
of the scale. The scale is rounded to the model's dtype first, since that is what is stored. A group of zeros has the scale eps
(qcli/ops/round_integers.py).

With search "mse" the scale is the one that makes the squared error of a group least (qcli/ops/fit_scale.py), with "imatrix" the
error weighted by what texts say of each column. Readers see no difference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from qcli.errors import UsageError
from qcli.methods._calibrated import Scaled
from qcli.methods._method import Encoder, Method, Parts, check_search
from qcli.schemes import NAMED, WHOLE_ROW, Scheme

if TYPE_CHECKING:
    import torch

    from qcli.methods._grid import Grid
    from qcli.methods._groups import Rounded

BITS = (2, 3, 4, 8)
GROUP_SIZES = (WHOLE_ROW, 32, 64, 128, 256)


@dataclass(frozen=True)
class RoundToNearest(Scaled):
    """`bits` of a code, `group_size` elements of a row that share a scale (-1: the row), and whether a group has a zero point
    too."""

    bits: int = 4
    group_size: int = 128
    zero_point: bool = False
    search: str = "none"

    casts_to_model_dtype: ClassVar[bool] = True
    needs_absmax: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_integers(self.bits, self.group_size)
        check_search(self.search)
        self.check_rounding()

    @property
    def scheme(self) -> Scheme:
        """What a weight is stored as with these options."""
        return integers(NAMED["rtn"], self.bits, self.group_size, self.zero_point)

    @classmethod
    def of(cls, scheme: Scheme) -> Self:
        """The method with the options that make `scheme`."""
        return cls(scheme.bits, scheme.size or WHOLE_ROW, scheme.zero_point)

    def encoder(self, out_features: int, in_features: int, device: torch.device, absmax: float = 0.0) -> Encoder:
        """Takes one weight of this shape."""
        from qcli.methods._groups import GroupEncoder

        return GroupEncoder(self.scheme, out_features, in_features, device, self._rounds)

    def decode(self, parts: Parts, out_features: int, in_features: int) -> torch.Tensor:
        """The weight float32 [out_features, in_features] that all parts together stand for."""
        from qcli.methods._groups import decode_groups

        return decode_groups(self.scheme, parts, out_features, in_features)

    def grid(self, weight: torch.Tensor, importance: torch.Tensor | None, absmax: float) -> Grid:
        """See Calibratable."""
        from qcli.methods._grid import group_grid
        from qcli.methods._groups import filled_up

        weights = filled_up(self.scheme, importance) if importance is not None and self.search == "imatrix" else None
        rounded = self._rounds(filled_up(self.scheme, weight), absmax, weights)
        return group_grid(self.scheme, rounded, weight.shape[1], None, weight.dtype)

    def _rounds(self, rows: torch.Tensor, absmax: float, weights: torch.Tensor | None = None) -> Rounded:
        from qcli.methods._groups import Rounded
        from qcli.ops.fit_scale import fit_scale
        from qcli.ops.round_integers import round_integers

        size, scale, zero = rows.shape[1] if self.group_size == WHOLE_ROW else self.group_size, None, None
        if self.search != "none":
            scale, zero = fit_scale(rows, size, "", self.bits, self.zero_point, rows.dtype, weights)
            scale = scale.view(len(rows), -1).to(rows.dtype)
            zero = zero.view(scale.shape) if self.zero_point else None
        codes, scale, zero, sums = round_integers(rows, size, *range_of(self.bits), self.zero_point, scale, zero)
        return Rounded(codes, scale, zero if self.zero_point else None, sums)


def range_of(bits: int) -> tuple[int, int]:
    """The least and the greatest code."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def integers(named: Scheme, bits: int, group_size: int, zero_point: bool) -> Scheme:
    """The scheme `named` with other options."""
    whole = group_size == WHOLE_ROW
    return replace(
        named, bits=bits, share="row" if whole else "group", size=0 if whole else group_size, zero_point=zero_point, scale="model"
    )


def check_integers(bits: int, group_size: int) -> None:
    """Raises UsageError for options that no scheme of integers in groups has."""
    for name, value, allowed in (("bits", bits, BITS), ("group_size", group_size, GROUP_SIZES)):
        if value not in allowed:
            raise UsageError(f"{name} is {value}, expected one of {', '.join(map(str, allowed))}")


METHOD: type[Method] = RoundToNearest
