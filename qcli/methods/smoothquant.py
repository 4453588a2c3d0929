"""SmoothQuant: int8 weights and activations, after the range of the activations was moved into the weights (arXiv:2211.10438).

What is stored is `int8` of compressed-tensors' format, W8A8. Before it, each channel of the inputs is divided by
  s_j = max|X_j|^a / max|W_j|^(1 - a)
and the weights' columns are multiplied by it. The paper has one a for a model. Here a is sought for each set of modules that read
the same input: the one of the grid for which their int8 outputs are nearest to what they were, on a sample of tokens.

With rounding "gptq" the integers of the rows are then chosen by GPTQ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from qcli.methods._calibrated import Calibrated, Needs
from qcli.methods._method import Encoder, Method, Parts
from qcli.methods.int8 import Int8
from qcli.schemes import NAMED, Scheme

if TYPE_CHECKING:
    import torch

    from qcli.methods._factors import Factors, Inputs
    from qcli.methods._grid import Grid

EXPONENTS = tuple(percent / 100 for percent in range(30, 100, 5))


@dataclass(frozen=True)
class SmoothQuant(Calibrated):
    """It has the options of calibrated rounding alone."""

    casts_to_model_dtype: ClassVar[bool] = True
    needs_absmax: ClassVar[bool] = False
    changes_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check_rounding()

    @property
    def needs(self) -> Needs:
        """What it must know of the inputs of a module."""
        return "hessian" if self.rounding == "gptq" else "moments"

    @property
    def scheme(self) -> Scheme:
        """What a weight is stored as."""
        return NAMED["smoothquant"]

    @classmethod
    def of(cls, scheme: Scheme) -> Self:
        """The method that makes `scheme`."""
        return cls()

    def encoder(self, out_features: int, in_features: int, device: torch.device, absmax: float = 0.0) -> Encoder:
        """Takes one weight of this shape."""
        return Int8().encoder(out_features, in_features, device, absmax)

    def decode(self, parts: Parts, out_features: int, in_features: int) -> torch.Tensor:
        """The weight float32 [out_features, in_features] that all parts together stand for."""
        return Int8().decode(parts, out_features, in_features)

    def grid(self, weight: torch.Tensor, importance: torch.Tensor | None, absmax: float) -> Grid:
        """See Calibratable."""
        from qcli.methods._grid import group_grid
        from qcli.methods._int8 import round_to_rows

        return group_grid(self.scheme, round_to_rows(weight, absmax), weight.shape[1], None, weight.dtype)

    def factors(self, inputs: Inputs, weights: Sequence[torch.Tensor]) -> Factors:
        """The best factors of inputs that modules with these weights [out_features, in_features] read."""
        import torch

        from qcli.methods._factors import best_factors, measured_rows, smooth_scale
        from qcli.methods.simulate import round_rows

        x = inputs.sample
        weight_absmax = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).float()
        weights = [measured_rows(weight) for weight in weights]
        wide = [weight.float() for weight in weights]
        wanted = [x @ w.t() for w in wide]

        def error(scale: torch.Tensor | None) -> float:
            rounded = round_rows(x if scale is None else x / scale)
            total = 0.0
            for w, weight, y in zip(wide, weights, wanted):
                changed = w if scale is None else w * scale
                grid = self.grid(changed.to(weight.dtype), None, 0.0)
                total += float((rounded @ self._nearest(changed, grid).t() - y).square_().sum(dtype=torch.float64))
            return total

        return best_factors(((a, smooth_scale(inputs.absmax, weight_absmax, a)) for a in EXPONENTS), error)

    def _nearest(self, weight: torch.Tensor, grid: Grid) -> torch.Tensor:
        from qcli.methods._gptq import nearest

        return nearest(weight, grid).values


METHOD: type[Method] = SmoothQuant
