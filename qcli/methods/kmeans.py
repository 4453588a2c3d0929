"""Tables by k-means (SqueezeLLM, arXiv:2306.07629): each output row has its own 4, 8 or 16 values, and a code names one of them.

The values of a row are the centres of a one-dimensional k-means of its weights, without calibration: all weights count alike. With
`sparse`, that share of each row, its largest magnitudes, is kept beside the codes as it is, and the centres are of the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from qcli.errors import UsageError
from qcli.methods._method import Encoder, Method, Parts
from qcli.schemes import MOST_SPARSE, NAMED, Scheme

if TYPE_CHECKING:
    import torch

BITS = (2, 3, 4)
_ENTRIES: tuple[Literal["float16", "float32"], ...] = ("float16", "float32")


@dataclass(frozen=True)
class Kmeans:
    """`bits` of a code, the share of each row that is kept in 16 bits, the most iterations, and the dtype of a table's entries."""

    bits: int = 4
    sparse: float = 0.0
    iterations: int = 50
    entries: str = "float16"

    casts_to_model_dtype: ClassVar[bool] = True
    needs_absmax: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(f"bits is {self.bits}, expected one of {', '.join(map(str, BITS))}")
        if not (math.isfinite(self.sparse) and 0 <= self.sparse <= MOST_SPARSE):
            raise UsageError(f"sparse is {self.sparse}, expected a share from 0 to {MOST_SPARSE}", "0.005 keeps 0.5% of each row.")
        if not 1 <= self.iterations <= 1000:
            raise UsageError(f"iterations is {self.iterations}, expected 1 to 1000")
        if self.entries not in _ENTRIES:
            raise UsageError(f"entries is {self.entries!r}, expected {' or '.join(_ENTRIES)}")

    @property
    def scheme(self) -> Scheme:
        """What a weight is stored as with these options."""
        entries = next(each for each in _ENTRIES if each == self.entries)
        return replace(NAMED["kmeans"], bits=self.bits, sparse=float(self.sparse), scale=entries)

    @property
    def with_texts(self) -> tuple[str, dict[str, object]]:
        """The name of the method that makes the same scheme by texts, and its options."""
        options = {"bits": self.bits, "outliers": self.sparse, "sensitive": 0.0, "iterations": self.iterations}
        return "squeezellm", options | {"entries": self.entries}

    @classmethod
    def of(cls, scheme: Scheme) -> Self:
        """The method with the options that make `scheme`."""
        return cls(scheme.bits, scheme.sparse, entries=scheme.scale)

    def encoder(self, out_features: int, in_features: int, device: torch.device, absmax: float = 0.0) -> Encoder:
        """Takes one weight of this shape."""
        from qcli.methods._tables import TableEncoder

        return TableEncoder(self.scheme, out_features, in_features, device, self.iterations)

    def decode(self, parts: Parts, out_features: int, in_features: int) -> torch.Tensor:
        """The weight float32 [out_features, in_features] that all parts together stand for."""
        from qcli.methods._tables import decode_tables

        return decode_tables(parts, out_features, in_features)


METHOD: type[Method] = Kmeans
