"""Absmax int8 of weights and activations (arXiv:2208.07339, section 2), in the three forms of the paper's Table 1.

They differ in what shares a scale: all of X and all of W (`int8-per-tensor`), each token of X and all of W (`int8-row-wise`), each
token of X and each output row of W (`int8`, the paper's vector-wise form). The last one is W8A8, which compressed-tensors holds.
Its scale of a row is absmax / 127 rounded to the model's dtype, as it is stored there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from qcli.methods._method import Encoder, Method, Parts
from qcli.schemes import NAMED, Scheme

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Int8:
    """One scale for each output row, or one for the whole weight, which is then taken in one chunk."""

    form: str = "int8"

    needs_absmax: ClassVar[bool] = False

    @property
    def with_texts(self) -> tuple[str, dict[str, object]] | None:
        """The name of the method that makes the same scheme by texts, and its options; None where there is none."""
        return ("smoothquant", {}) if self.form == "int8" else None

    @property
    def casts_to_model_dtype(self) -> bool:
        """A scale in the model's dtype is of weights in it."""
        return self.scheme.scale == "model"

    @property
    def scheme(self) -> Scheme:
        """What a weight is stored as."""
        return NAMED[self.form]

    @classmethod
    def of(cls, scheme: Scheme) -> Self:
        """The method in the form of that name."""
        return cls(scheme.name)

    def encoder(self, out_features: int, in_features: int, device: torch.device, absmax: float = 0.0) -> Encoder:
        """Takes one weight of this shape."""
        from qcli.methods._groups import GroupEncoder
        from qcli.methods._int8 import RowEncoder, round_to_rows

        if self.scheme.share == "row":
            return GroupEncoder(self.scheme, out_features, in_features, device, round_to_rows)
        return RowEncoder(1, out_features * in_features, device)

    def decode(self, parts: Parts, out_features: int, in_features: int) -> torch.Tensor:
        """The weight float32 [out_features, in_features] that all parts together stand for."""
        from qcli.methods._groups import decode_groups
        from qcli.methods._int8 import decode_rows

        if self.scheme.share == "row":
            return decode_groups(self.scheme, parts, out_features, in_features)
        return decode_rows(parts, out_features, in_features)


METHOD: type[Method] = Int8
