"""Methods simulated inside a streamed model. While the calls of a method pass a block, its linear layers compute as that method
does. The errors of weights and activations are added up."""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

import torch

from qcli import methods as quantizers
from qcli.checkpoint.layout import Linear
from qcli.methods.simulate import Simulated, simulate
from qcli.schemes import Scheme
from qcli.streaming.run import Observer, current_call, same_tensor
from qcli.streaming.skeleton import Skeleton
from qcli.streaming.units import Unit

OUTLIER = 6.0  # magnitude of an outlier activation (arXiv:2208.07339, section 3.2)


@dataclass
class _Sums:
    """The sum of squared values and that of squared errors, float64 [2], kept on the device."""

    sums: torch.Tensor | None = None

    def add(self, sums: torch.Tensor) -> None:
        """Adds sums of squared values and squared errors, float64 [2]."""
        self.sums = sums if self.sums is None else self.sums + sums

    @property
    def sqnr(self) -> float | None:
        """10 log10(norm / error) in dB; None where there was no error, or no signal."""
        norm, error = (0.0, 0.0) if self.sums is None else self.sums.tolist()
        return 10 * math.log10(norm / error) if norm > 0 and error > 0 else None


def _squares(x: torch.Tensor, error: torch.Tensor, dim: int) -> torch.Tensor:
    """Sums of squares of x and of error along a dimension, float64 [2, ...]. Each sum is made in float32, which is exact to a
    millionth for a few thousand squares and takes a fraction of the time. `error` is overwritten."""
    return torch.stack((x.square().sum(dim), error.square_().sum(dim))).double()


@dataclass
class Rounded:
    """Activations [sequences, tokens, columns] under a method. `values` are X^ float32. Where the method `keeps_columns`, `kept`
    are the columns that a sequence has in 16 bits, bool [sequences, columns]. `sums` are the sums of squares and of squared errors,
    float64 [2], over all columns, and over those without an outlier in their sequence; None where nothing was rounded."""

    values: torch.Tensor
    kept: torch.Tensor
    keeps_columns: bool
    sums: tuple[torch.Tensor, torch.Tensor] | None

    @classmethod
    def of(cls, x: torch.Tensor, simulated: Simulated) -> "Rounded":
        """Rounds x [sequences, tokens, columns] as the layer of `simulated` does."""
        values, kept = simulated.activations(x)
        wide = x.float()
        if values is x or values is wide:
            return cls(values, kept, simulated.keeps_columns, None)
        squares = _squares(wide, wide - values, -2)
        ordinary = wide.abs().amax(-2) < OUTLIER
        return cls(values, kept, simulated.keeps_columns, (squares.sum((1, 2)), squares.masked_fill(~ordinary, 0.0).sum((1, 2))))


@dataclass
class Rounding:
    """What a method did to all linear layers: sums of weights, of activations, and of `ordinary` activations, which are those in
    columns without an outlier in the sequence. `kept` has, by module, the columns that any sequence kept in 16 bits."""

    weights: _Sums = field(default_factory=_Sums)
    activations: _Sums = field(default_factory=_Sums)
    ordinary: _Sums = field(default_factory=_Sums)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)

    def note(self, module: str, rounded: Rounded) -> None:
        """Adds the activations of a layer."""
        if rounded.keeps_columns:
            kept = rounded.kept.any(0)
            self.kept[module] = self.kept[module] | kept if module in self.kept else kept
        if rounded.sums is not None:
            whole, ordinary = rounded.sums
            self.activations.add(whole)
            self.ordinary.add(ordinary)

    def merge(self, other: "Rounding") -> None:
        """Adds what the same method did with other texts, on another machine."""
        for name in ("weights", "activations", "ordinary"):
            if (theirs := getattr(other, name).sums) is not None:
                getattr(self, name).add(theirs)
        for module, kept in other.kept.items():
            self.kept[module] = self.kept[module] | kept if module in self.kept else kept

    def outlier_columns(self, module: str) -> int:
        """How many columns some sequence kept in 16 bits."""
        return int(self.kept[module].sum()) if module in self.kept else 0


class SequencesMixed(Exception):
    """A layer got tokens of several windows, and nothing says which window each belongs to, as with the tokens of an expert."""


class Methods(Observer):
    """The variant of a method's name computes as the method does. `roundings` has the sums of each, by name.

    Calls may read several windows of one length. Raises SequencesMixed where a layer does not see them one after another.
    """

    def __init__(self, skeleton: Skeleton, methods: Sequence[Scheme]):
        self.model, self.methods = skeleton.model, {scheme.name: quantizers.make(scheme) for scheme in methods}
        self.linears = quantizable(skeleton)
        self.roundings = {name: Rounding() for name in self.methods}
        # Experts get a share of the tokens: each window then needs a call of its own.
        self.of_experts = any(re.search(r"expert.*\.\d+\.", linear.module) for linear in self.linears)
        # The last input under a parent module: projections that read the same input share its rounding.
        self._last: tuple[str, torch.Tensor, Rounded] | None = None

    @contextmanager
    def variant(self, unit: Unit, name: str) -> Iterator[None]:
        """While this lasts, the unit's linear layers compute as the method does."""
        changed = []
        try:
            for linear in self.linears:
                if linear.module == unit.name or linear.module.startswith(f"{unit.name}."):
                    module = self.model.get_submodule(linear.module)
                    module.forward = self._forward(module, linear, name)
                    changed.append(module)
            yield
        finally:
            self._last = None
            for module in changed:
                del module.forward

    def simulated(self, name: str, linear: Linear, weight: torch.Tensor) -> Simulated:
        """The layer `linear` with this weight [out_features, in_features] under the method `name`."""
        return simulate(self.methods[name], weight)

    def _forward(self, module: torch.nn.Module, linear: Linear, name: str):
        rounding = self.roundings[name]
        weight = module.weight.t().contiguous() if linear.transposed else module.weight
        simulated = self.simulated(name, linear, weight)
        if simulated.weight is not weight:
            wide = weight.float()
            rounding.weights.add(_squares(wide, wide - simulated.weight, 1).sum(1))

        def forward(x: torch.Tensor) -> torch.Tensor:
            rounded = self._rounded(linear.module.rpartition(".")[0], x, simulated)
            rounding.note(linear.module, rounded)
            y = simulated.product(rounded.values, rounded.kept, x.dtype, module.bias)
            return y.view(*x.shape[:-1], y.shape[-1])

        return forward

    def _rounded(self, parent: str, x: torch.Tensor, simulated: Simulated) -> Rounded:
        if self._last is None or self._last[0] != parent or not same_tensor(self._last[1], x):
            self._last = parent, x, Rounded.of(_sequences(x), simulated)
        return self._last[2]


def _sequences(x: torch.Tensor) -> torch.Tensor:
    """x [..., columns] as [sequences, tokens, columns]. In a call of several windows, each is a sequence; in a call of one, all
    that the layer sees is. Raises SequencesMixed."""
    call = current_call()
    batch = call.batch if call else None
    if batch is None or len(batch.windows) == 1:
        tokens = x.shape[-2] if x.dim() > 1 else 1
        return x.reshape(prod(x.shape[:-2]), tokens, x.shape[-1])
    rows, tokens = batch.ids.shape
    if x.shape[:-1] not in ((rows, tokens), (rows * tokens,)):
        raise SequencesMixed
    return x.reshape(rows, tokens, x.shape[-1])


def quantizable(skeleton: Skeleton) -> list[Linear]:
    """The linear layers that `qcli quantize` would quantize."""
    return skeleton.layout.quantizable()
