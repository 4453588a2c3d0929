"""Absmax int8 of weights and activations (arXiv:2208.07339, section 2), in the three forms of the paper's Table 1.

They differ in what shares a scale: all of X and all of W (`int8-per-tensor`), each token of X and all of W (`int8-row-wise`), each
token of X and each output row of W (`int8`, the paper's vector-wise form).
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from qcli.methods._int8 import RowEncoder, decode_rows
from qcli.methods._method import Method, Parts
from qcli.schemes import NAMED, Scheme


@dataclass(frozen=True)
class Int8:
    """One scale for each output row, or one for the whole weight, which is then taken in one chunk."""

    form: str = "int8"

    casts_to_model_dtype: ClassVar[bool] = False

    @property
    def scheme(self) -> Scheme:
        """What a weight is stored as."""
        return NAMED[self.form]

    @classmethod
    def of(cls, scheme: Scheme) -> Self:
        """The method in the form of that name."""
        return cls(scheme.name)

    def encoder(self, out_features: int, in_features: int, device: torch.device) -> RowEncoder:
        """Takes one weight of this shape."""
        if self.scheme.share == "row":
            return RowEncoder(out_features, in_features, device)
        return RowEncoder(1, out_features * in_features, device)

    def decode(self, parts: Parts, out_features: int, in_features: int) -> torch.Tensor:
        """The weight float32 [out_features, in_features] that all parts together stand for."""
        return decode_rows(parts, out_features, in_features)


METHOD: type[Method] = Int8
