"""NF3: NormalFloat of 3 bits in groups of a row. The eight entries are the quantiles that NF4 has, made with 3 bits
(qcli/codebooks.py; QLoRA, arXiv:2305.14314, appendix E).

A group has one scale, its absmax rounded to the model's dtype, and a weight is the nearest entry times the scale. Halfway between
two entries the lower one is taken. With search "mse" the scale is the one that makes the squared error of the group least.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from qcli.errors import UsageError
from qcli.methods._calibrated import Scaled
from qcli.methods._method import Encoder, Method, Parts, check_search
from qcli.schemes import NAMED, Scheme

if TYPE_CHECKING:
    import torch

    from qcli.methods._grid import Grid
    from qcli.methods._groups import Rounded

GROUP_SIZES = (32, 64, 128, 256)


@dataclass(frozen=True)
class Nf3(Scaled):
    """`group_size`: elements of a row that share a scale. `search`: how the scale is found, "none" for the absmax, or "mse"."""

    group_size: int = 64
    search: str = "none"

    casts_to_model_dtype: ClassVar[bool] = True
    needs_absmax: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise UsageError(f"group_size is {self.group_size}, expected one of {', '.join(map(str, GROUP_SIZES))}")
        check_search(self.search)
        self.check_rounding()

    @property
    def scheme(self) -> Scheme:
        """What a weight is stored as with these options."""
        return replace(NAMED["nf3"], size=self.group_size)

    @classmethod
    def of(cls, scheme: Scheme) -> Self:
        """The method with the options that make `scheme`."""
        return cls(scheme.size)

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
        from qcli.ops.round_floats import round_floats

        scale = None
        if self.search != "none":
            scale, _ = fit_scale(rows, self.group_size, "nf3", 3, False, rows.dtype, weights)
            scale = scale.view(len(rows), -1).to(rows.dtype)
        codes, scale, sums = round_floats(rows, "nf3", self.group_size, scale=scale)
        return Rounded(codes, scale, None, sums)


METHOD: type[Method] = Nf3
