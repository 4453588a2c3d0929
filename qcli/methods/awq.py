"""AWQ: integers of 4 bits with zero points, after the weights' columns were scaled by how large their activations are
(arXiv:2306.00978).

Columns that meet large activations are multiplied by s > 1, so that their rounding costs less, and the input is divided by s. With
m_j = mean|x_j|, s = m^r, or m^r / v^(1 - r) with the mean size v of a column's weights, over 20 values of r each, normalized
(qcli/methods/_factors.py). All modules that read one input share s. The s is taken for which their outputs, under the rounding
that is then made, are nearest to what they were, over all tokens: by sum x x^T, so that no product with texts is repeated.

AutoAWQ then clips each group's range. Here scales and zero points are sought that make the error least, weighted by E[x^2], which
is search "imatrix". With rounding "gptq" the integers are chosen by GPTQ.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

from qcli.methods._calibrated import Scaled
from qcli.methods._method import Encoder, Method, Parts, check_search
from qcli.methods.rtn import RoundToNearest, check_integers, integers
from qcli.schemes import NAMED, WHOLE_ROW, Scheme

if TYPE_CHECKING:
    import torch

    from qcli.methods._grid import Grid

_BITS = 4


@dataclass(frozen=True)
class Awq(Scaled):
    """`group_size` elements of a row that share a scale and a zero point (-1: the row)."""

    group_size: int = 128
    search: str = "imatrix"
    transform: str = field(default="awq", kw_only=True)

    casts_to_model_dtype: ClassVar[bool] = True
    needs_absmax: ClassVar[bool] = False
    steps: ClassVar[int] = 20

    def __post_init__(self) -> None:
        check_integers(_BITS, self.group_size)
        check_search(self.search)
        self.check_rounding()

    @property
    def scheme(self) -> Scheme:
        """What a weight is stored as with these options."""
        return integers(NAMED["awq"], _BITS, self.group_size, zero_point=True)

    @classmethod
    def of(cls, scheme: Scheme) -> Self:
        """The method with the options that make `scheme`."""
        return cls(scheme.size or WHOLE_ROW)

    @property
    def _integers(self) -> RoundToNearest:
        return RoundToNearest(_BITS, self.group_size, zero_point=True, search=self.search)

    def encoder(self, out_features: int, in_features: int, device: torch.device, absmax: float = 0.0) -> Encoder:
        """Takes one weight of this shape."""
        return self._integers.encoder(out_features, in_features, device, absmax)

    def decode(self, parts: Parts, out_features: int, in_features: int) -> torch.Tensor:
        """The weight float32 [out_features, in_features] that all parts together stand for."""
        return self._integers.decode(parts, out_features, in_features)

    def grid(self, weight: torch.Tensor, importance: torch.Tensor | None, absmax: float) -> Grid:
        """See Calibratable."""
        return self._integers.grid(weight, importance, absmax)


METHOD: type[Method] = Awq
