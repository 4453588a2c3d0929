"""Methods simulated inside a streamed model: while the calls of a method pass a block, its linear layers compute as that
method does, and what it makes of weights and activations is added up."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from qcli.checkpoint.linears import Linear
from qcli.simulation import Prepared, Simulation
from qcli.streaming.run import Observer
from qcli.streaming.skeleton import Skeleton
from qcli.streaming.units import Unit

OUTLIER = 6.0  # magnitude of an outlier activation (arXiv:2208.07339, section 3.2)


@dataclass
class _Sums:
    """Squared values, and squared errors: float64 sums, kept on the device."""

    norm: torch.Tensor | float = 0.0
    error: torch.Tensor | float = 0.0

    def add(self, norm: torch.Tensor, error: torch.Tensor) -> None:
        """Adds squared values and squared errors."""
        self.norm, self.error = self.norm + norm.sum(), self.error + error.sum()

    @property
    def sqnr(self) -> float | None:
        """10 log10(norm / error) in dB; None where nothing was lost, or there was nothing."""
        norm, error = float(self.norm), float(self.error)
        return 10 * math.log10(norm / error) if norm > 0 and error > 0 else None


def _squares(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Sums of squares along a dimension of x, float64. Each in float32: along one dimension that is exact to a millionth, and
    takes a tenth of the time."""
    return torch.linalg.vector_norm(x, dim=dim).double().square()


@dataclass
class Rounding:
    """What a method did to all linear layers: signal over error of weights, of activations, and of `ordinary` activations,
    those of columns without an outlier in the sequence. `outlier_columns` counts, by module, those it ever kept whole."""

    weights: _Sums = field(default_factory=_Sums)
    activations: _Sums = field(default_factory=_Sums)
    ordinary: _Sums = field(default_factory=_Sums)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)

    def note(self, module: str, x: torch.Tensor, rounded: torch.Tensor, kept: torch.Tensor) -> None:
        """Adds the activations x [tokens, columns] of one sequence."""
        self.kept[module] = self.kept[module] | kept if module in self.kept else kept
        if rounded is x:
            return
        x = x.float()
        norm, error = _squares(x, 0), _squares(x - rounded, 0)
        self.activations.add(norm, error)
        ordinary = torch.linalg.vector_norm(x, torch.inf, dim=0) < OUTLIER
        self.ordinary.add(norm[ordinary], error[ordinary])

    def outlier_columns(self, module: str) -> int:
        """Columns that were kept whole for some sequence."""
        return int(self.kept[module].sum()) if module in self.kept else 0


class Methods(Observer):
    """Makes the variant of each method's name compute as it does. `roundings` has by that name what it did."""

    def __init__(self, skeleton: Skeleton, methods: Sequence[Simulation]):
        self.model, self.methods = skeleton.model, {method.name: method for method in methods}
        self.linears = quantizable(skeleton)
        self.roundings = {name: Rounding() for name in self.methods}

    @contextmanager
    def variant(self, unit: Unit, name: str) -> Iterator[None]:
        """Puts the method in the place of the unit's linear layers while this lasts."""
        changed = []
        try:
            for linear in self.linears:
                if linear.module == unit.name or linear.module.startswith(f"{unit.name}."):
                    module = self.model.get_submodule(linear.module)
                    module.forward = self._forward(module, linear, name)
                    changed.append(module)
            yield
        finally:
            for module in changed:
                del module.forward

    def _forward(self, module: torch.nn.Module, linear: Linear, name: str):
        rounding = self.roundings[name]
        weight = module.weight.t().contiguous() if linear.transposed else module.weight
        prepared: Prepared = self.methods[name].weight(weight)
        if prepared.weight is not weight:
            rounding.weights.add(_squares(weight.float(), 1), _squares(weight.float() - prepared.weight, 1))

        def seen(x: torch.Tensor, rounded: torch.Tensor, kept: torch.Tensor) -> None:
            rounding.note(linear.module, x, rounded, kept)

        return lambda x: prepared.linear(x, module.bias, seen)


def quantizable(skeleton: Skeleton) -> list[Linear]:
    """The linear layers that `qcli quantize` would quantize."""
    layout = skeleton.layout
    return [linear for linear in layout.linears.values() if not layout.skipped(linear.module, None)]
