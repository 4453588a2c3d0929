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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from qcli.methods._calibrated import Calibrated, Needs
from qcli.methods._method import Encoder, Method, Parts, check_search
from qcli.methods.rtn import RoundToNearest, check_integers, integers
from qcli.schemes import NAMED, WHOLE_ROW, Scheme

if TYPE_CHECKING:
    import torch

    from qcli.methods._factors import Factors, Inputs
    from qcli.methods._grid import Grid

STEPS = 20
_BITS = 4


@dataclass(frozen=True)
class Awq(Calibrated):
    """`group_size` elements of a row that share a scale and a zero point (-1: the row)."""

    group_size: int = 128
    search: str = "imatrix"

    casts_to_model_dtype: ClassVar[bool] = True
    needs_absmax: ClassVar[bool] = False
    changes_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_integers(_BITS, self.group_size)
        check_search(self.search)
        self.check_rounding()

    @property
    def needs(self) -> Needs:
        """What it must know of the inputs of a module."""
        return "hessian"

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

    def factors(self, inputs: Inputs, weights: Sequence[torch.Tensor]) -> Factors:
        """The best factors of inputs that modules with these weights [out_features, in_features] read."""
        from qcli.methods._factors import best_factors, measured_rows
        from qcli.methods._gptq import nearest, output_error

        assert inputs.hessian is not None
        hessian = inputs.hessian
        measured = [measured_rows(weight) for weight in weights]

        def error(scale: torch.Tensor | None) -> float:
            total = 0.0
            for weight in measured:
                wide = weight.float()
                changed = wide if scale is None else wide * scale
                importance = inputs.mean_square if scale is None else inputs.mean_square / scale.square()
                values = nearest(changed, self.grid(changed.to(weight.dtype), importance, 0.0)).values
                total += output_error(wide, values if scale is None else values / scale, hessian)
            return total

        return best_factors(self._candidates(inputs, weights), error)

    def _candidates(self, inputs: Inputs, weights: Sequence[torch.Tensor]) -> Iterator[tuple[float, torch.Tensor]]:
        from qcli.methods._factors import awq_scale, awq_weight_mean

        magnitude = inputs.magnitude.double()
        size = weights[0].shape[1] if self.group_size == WHOLE_ROW else self.group_size
        weight_mean = awq_weight_mean([weight.double() for weight in weights], size)
        for step in range(STEPS):
            if step:  # 0 is the identity
                yield step / STEPS, awq_scale(magnitude, None, step / STEPS).float()
            yield step / STEPS, awq_scale(magnitude, weight_mean, step / STEPS).float()


METHOD: type[Method] = Awq
