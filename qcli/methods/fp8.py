"""FP8: weights in E4M3 (arXiv:2209.05433), an output row, a square block or the whole weight sharing a scale.

A code is w / scale in E4M3, to nearest, with scale = absmax / 448 rounded to the model's dtype. It stands for code * scale. Readers
round activations likewise, each token with a scale of its own, unless `activations` is false.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from qcli.errors import UsageError
from qcli.methods._calibrated import Calibrated
from qcli.methods._method import Encoder, Method, Parts
from qcli.schemes import FP8_BLOCK, NAMED, Scheme, Share

if TYPE_CHECKING:
    import torch

    from qcli.methods._grid import Grid
    from qcli.methods._groups import Rounded

_SHARES: tuple[Share, ...] = ("row", "block", "tensor")


@dataclass(frozen=True)
class Fp8(Calibrated):
    """What shares a scale: "row", "block" (squares of 128, as DeepSeek-V3 has them) or "tensor"; whether activations are
    rounded."""

    share: str = "row"
    activations: bool = True

    casts_to_model_dtype: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check_rounding()
        if self.share not in _SHARES:
            raise UsageError(f"share is {self.share!r}, expected {', '.join(_SHARES[:-1])} or {_SHARES[-1]}")

    @property
    def needs_absmax(self) -> bool:
        """A scale of the whole weight is known only once it has been read."""
        return self.share == "tensor"

    @property
    def scheme(self) -> Scheme:
        """What a weight is stored as with these options."""
        share = next(each for each in _SHARES if each == self.share)
        found = replace(NAMED["fp8"], share=share, size=FP8_BLOCK if share == "block" else 0)
        if not self.activations:
            return replace(found, activations=None, activation_codebook=None)
        return replace(found, activations="group" if share == "block" else "token")

    @classmethod
    def of(cls, scheme: Scheme) -> Self:
        """The method with the options that make `scheme`."""
        return cls(scheme.share, scheme.activations is not None)

    def encoder(self, out_features: int, in_features: int, device: torch.device, absmax: float = 0.0) -> Encoder:
        """Takes one weight of this shape."""
        from qcli.methods._groups import GroupEncoder

        rows = min(FP8_BLOCK, out_features) if self.share == "block" else 1
        return GroupEncoder(self.scheme, out_features, in_features, device, self._rounds, rows, absmax)

    def decode(self, parts: Parts, out_features: int, in_features: int) -> torch.Tensor:
        """The weight float32 [out_features, in_features] that all parts together stand for."""
        from qcli.methods._groups import decode_groups

        return decode_groups(self.scheme, parts, out_features, in_features)

    def grid(self, weight: torch.Tensor, importance: torch.Tensor | None, absmax: float) -> Grid:
        """See Calibratable."""
        from qcli.methods._grid import group_grid

        return group_grid(self.scheme, self._rounds(weight, absmax), weight.shape[1], None, weight.dtype)

    def _rounds(self, rows: torch.Tensor, absmax: float) -> Rounded:
        import torch

        from qcli.methods._groups import Rounded
        from qcli.ops.round_floats import E4M3_MAX, round_floats

        size, scale = (FP8_BLOCK, None) if self.share == "block" else (rows.shape[1], None)
        if self.share == "tensor":
            scale = (torch.full((1, 1), absmax, device=rows.device) / E4M3_MAX).to(rows.dtype)
            scale = torch.where(scale == 0, torch.finfo(rows.dtype).eps, scale)
        codes, scale, sums = round_floats(rows, "fp8", size, size if self.share == "block" else 1, scale=scale)
        return Rounded(codes, scale, None, sums)


METHOD: type[Method] = Fp8
