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
    """Squared values, and squared errors, in float64."""

    norm: torch.Tensor | float = 0.0
    error: torch.Tensor | float = 0.0

    def add(self, values: torch.Tensor, rounded: torch.Tensor) -> None:
        self.norm = self.norm + values.float().square().sum(dtype=torch.float64)
        self.error = self.error + (values.float() - rounded).square().sum(dtype=torch.float64)

    @property
    def sqnr(self) -> float | None:
        """10 log10(norm / error) in dB; None where nothing was lost, or there was nothing."""
        norm, error = float(self.norm), float(self.error)
        return 10 * math.log10(norm / error) if norm > 0 and error > 0 else None


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
        self.activations.add(x, rounded)
        ordinary = (x.abs() < OUTLIER).all(0)
        self.ordinary.add(x * ordinary, rounded * ordinary)

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
        rounding.weights.add(weight, prepared.weight)

        def seen(x: torch.Tensor, rounded: torch.Tensor, kept: torch.Tensor) -> None:
            rounding.note(linear.module, x, rounded, kept)

        return lambda x: prepared.linear(x, module.bias, seen)


def quantizable(skeleton: Skeleton) -> list[Linear]:
    """The linear layers that `qcli quantize` would quantize."""
    layout = skeleton.layout
    return [linear for linear in layout.linears.values() if not layout.skipped(linear.module, None)]
