"""NVFP4: E2M1 codes in groups of 16, each with a scale in E4M3, over one float32 scale of the weight.

With `activations` readers round activations likewise, in groups of 16 of a token. Their own float32 scale would come from
calibration. Without any it is 1, which leaves E4M3 its whole range: groups with an absmax of 0.09 to 2,688 lose nothing by it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from qcli.methods._calibrated import Calibrated
from qcli.methods._method import Encoder, Method, Parts
from qcli.schemes import NAMED, Scheme

if TYPE_CHECKING:
    import torch

    from qcli.methods._grid import Grid
    from qcli.methods._groups import Rounded


@dataclass(frozen=True)
class Nvfp4(Calibrated):
    """Whether activations are rounded too (W4A4)."""

    activations: bool = False

    casts_to_model_dtype: ClassVar[bool] = True
    needs_absmax: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check_rounding()

    @property
    def scheme(self) -> Scheme:
        """What a weight is stored as with these options."""
        weights = NAMED["nvfp4"]
        return replace(weights, activations="group", activation_codebook="e2m1") if self.activations else weights

    @classmethod
    def of(cls, scheme: Scheme) -> Self:
        """The method with the options that make `scheme`."""
        return cls(scheme.activations is not None)

    def encoder(self, out_features: int, in_features: int, device: torch.device, absmax: float = 0.0) -> Encoder:
        """Takes one weight of this shape."""
        from qcli.methods._groups import GroupEncoder

        return GroupEncoder(self.scheme, out_features, in_features, device, self._rounds, absmax=absmax)

    def decode(self, parts: Parts, out_features: int, in_features: int) -> torch.Tensor:
        """The weight float32 [out_features, in_features] that all parts together stand for."""
        from qcli.methods._groups import decode_groups

        return decode_groups(self.scheme, parts, out_features, in_features)

    def grid(self, weight: torch.Tensor, importance: torch.Tensor | None, absmax: float) -> Grid:
        """See Calibratable."""
        from qcli.methods._grid import group_grid
        from qcli.methods._groups import filled_up, whole_scale

        rounded = self._rounds(filled_up(self.scheme, weight), absmax)
        return group_grid(self.scheme, rounded, weight.shape[1], whole_scale(absmax).to(weight.device), weight.dtype)

    def _rounds(self, rows: torch.Tensor, absmax: float) -> Rounded:
        from qcli.methods._groups import Rounded, whole_scale
        from qcli.ops.round_floats import round_floats

        codes, scale, sums = round_floats(rows, "nvfp4", self.scheme.size, whole=whole_scale(absmax).item())
        return Rounded(codes, scale, None, sums)


METHOD: type[Method] = Nvfp4
