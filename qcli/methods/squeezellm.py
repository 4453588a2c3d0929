"""SqueezeLLM: tables of rows whose entries lie where the loss bends most, and a few weights beside them (arXiv:2306.07629).

Each output row has its own 4, 8 or 16 values, the centres of a one-dimensional k-means in which a weight counts by its Fisher
information: the squared gradient of the loss of texts (section 4.1). Two shares of each row are kept in 16 bits beside the codes,
and do not count in the tables (section 4.2): `outliers`, its largest magnitudes, and of the others `sensitive`, those of the
largest Fisher information. The authors choose both over a whole weight. Here each row keeps the same number, so that every size is
known before a weight is read.

The texts pass the model unquantized, forward and backward (qcli/calibration/backward.py). So nothing depends on the order in which
modules are rounded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from qcli.errors import UsageError
from qcli.methods._calibrated import Needs
from qcli.methods._method import Encoder, Method, Parts
from qcli.methods.kmeans import Kmeans
from qcli.schemes import MOST_SPARSE, NAMED, Scheme

if TYPE_CHECKING:
    import torch

SENSITIVE = 0.0005
_DIGITS = 9  # of a sum of shares


@dataclass(frozen=True)
class SqueezeLLM:
    """`bits` of a code, the shares of each row that are kept in 16 bits, the most iterations of k-means, and the dtype of a table's
    entries."""

    bits: int = 4
    outliers: float = 0.0045
    sensitive: float = SENSITIVE
    iterations: int = 50
    entries: str = "float16"

    casts_to_model_dtype: ClassVar[bool] = True
    needs_absmax: ClassVar[bool] = False
    needs: ClassVar[Needs] = "fisher"

    def __post_init__(self) -> None:
        for name in ("outliers", "sensitive"):
            if not 0 <= getattr(self, name) <= MOST_SPARSE:
                raise UsageError(f"{name} is {getattr(self, name)}, expected a share of each row from 0 to {MOST_SPARSE}")
        self.without_texts()  # raises for what k-means does not take

    @property
    def _sparse(self) -> float:
        return round(float(self.outliers) + float(self.sensitive), _DIGITS)

    @property
    def scheme(self) -> Scheme:
        """What a weight is stored as with these options."""
        entries: Literal["float16", "float32"] = "float32" if self.entries == "float32" else "float16"
        return replace(NAMED["squeezellm"], bits=self.bits, sparse=self._sparse, scale=entries)

    @classmethod
    def of(cls, scheme: Scheme) -> Self:
        """The method with options that make `scheme`: no more of a row is kept by sensitivity than by default."""
        sensitive = min(SENSITIVE, scheme.sparse)
        return cls(scheme.bits, round(scheme.sparse - sensitive, _DIGITS), sensitive, entries=scheme.scale)

    def without_texts(self) -> Kmeans:
        """The method of the same parts by the weights alone."""
        return Kmeans(self.bits, self._sparse, self.iterations, self.entries)

    def encoder(self, out_features: int, in_features: int, device: torch.device, absmax: float = 0.0) -> Encoder:
        """Takes one weight of this shape, without texts."""
        return self.without_texts().encoder(out_features, in_features, device)

    def encoder_by(self, fisher: torch.Tensor) -> Encoder:
        """Takes one weight of the shape of `fisher`, float32 [out_features, in_features]: its Fisher information."""
        from qcli.methods._tables import TableEncoder

        kept = self.scheme.sparse_columns(fisher.shape[1])
        sensitive = round(kept * self.sensitive / self._sparse) if kept else 0
        return TableEncoder(self.scheme, *fisher.shape, fisher.device, self.iterations, fisher, sensitive)

    def decode(self, parts: Parts, out_features: int, in_features: int) -> torch.Tensor:
        """The weight float32 [out_features, in_features] that all parts together stand for."""
        return self.without_texts().decode(parts, out_features, in_features)


METHOD: type[Method] = SqueezeLLM
