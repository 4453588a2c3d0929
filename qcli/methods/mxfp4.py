"""MXFP4: E2M1 codes in groups of 32, each with a power of two as its scale (OCP Microscaling Formats 1.0)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from qcli.methods._calibrated import Calibrated
from qcli.methods._method import Encoder, Method, Parts
from qcli.schemes import NAMED, Scheme

if TYPE_CHECKING:
    import torch

    from qcli.methods._grid import Grid
    from qcli.methods._groups import Rounded


@dataclass(frozen=True)
class Mxfp4(Calibrated):
    """It has no options but the rounding: the format fixes all of them."""

    casts_to_model_dtype: ClassVar[bool] = True
    needs_absmax: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.check_rounding()

    @property
    def scheme(self) -> Scheme:
        """What a weight is stored as."""
        return NAMED["mxfp4"]

    @classmethod
    def of(cls, scheme: Scheme) -> Self:
        """The method."""
        return cls()

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

        rounded = self._rounds(filled_up(self.scheme, weight), absmax)
        return group_grid(self.scheme, rounded, weight.shape[1], None, weight.dtype)

    def _rounds(self, rows: torch.Tensor, absmax: float) -> Rounded:
        from qcli.methods._groups import Rounded
        from qcli.ops.round_floats import round_floats

        codes, scale, sums = round_floats(rows, "mxfp4", self.scheme.size)
        return Rounded(codes, scale, None, sums)


METHOD: type[Method] = Mxfp4
