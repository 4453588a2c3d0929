"""What rounding weights and activations does to the outputs of the linear layers at a site.

The global SQNR hides the damage: outliers carry most of the power and are rounded well. It is therefore measured a second time,
over what reaches the outputs through the other channels alone.

Only the first windows are sampled, each for itself: a machine that has some of them adds its share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qcli.methods._method import Method
from qcli.methods.errors import decibels
from qcli.methods.simulate import simulate
from qcli.outliers.statistics import is_outlier
from qcli.outliers.sums import WideSum
from qcli.streaming.corpus import Window

METHODS = ("int8-per-tensor", "int8-row-wise", "int8", "llm-int8", "nf4")  # of qcli.schemes, whose damage is measured
SAMPLE_TOKENS = 512  # rounding is measured at about so many outputs, of the first windows with this many tokens


@dataclass(frozen=True)
class Sample:
    """The windows whose outputs are rounded, by number. Outputs are those of every `step`th token."""

    windows: frozenset[int]
    step: int

    @classmethod
    def of(cls, windows: Sequence[Window], prefix: int) -> "Sample":
        """The first of all windows, with SAMPLE_TOKENS or more. The first `prefix` tokens of each are not measured."""
        count, taken = 0, 0
        while count < len(windows) and taken < SAMPLE_TOKENS:
            taken += len(windows[count].ids)
            count += 1
        return cls(frozenset(range(count)), -(-(taken - count * prefix) // SAMPLE_TOKENS))


class Damage:
    """Sums of squares over outputs, and over what reaches them through channels without an outlier in their sequence: of the
    outputs, and of what rounding changes in them."""

    def __init__(self) -> None:
        self._sums = WideSum(4)

    def add(self, whole: tuple[torch.Tensor, torch.Tensor], rounded: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Adds outputs [tokens, out_features]: (all, through ordinary channels) as they are, and rounded."""
        terms = [part for x, y in zip(whole, rounded) for part in (x, x - y)]
        self._sums.add(torch.tensor([x.square().sum(dtype=torch.float64).item() for x in terms], dtype=torch.float64))

    def merge(self, other: "Damage") -> None:
        """Adds the outputs of another."""
        self._sums.merge(other._sums)

    @property
    def output(self) -> float | None:
        """10 log10(||Y||^2 / ||Y - Y^||^2) in dB; None where nothing was lost or there is nothing."""
        return decibels(*self._sums.value[:2].tolist())

    @property
    def ordinary(self) -> float | None:
        """The same for the part that comes through ordinary channels."""
        return decibels(*self._sums.value[2:].tolist())


class SampleOf:
    """Inputs of a site, sequence by sequence. The first `prefix` tokens of each are rounded with the others and not measured."""

    def __init__(self, prefix: int):
        self.prefix = prefix
        self._sequences: dict[int, torch.Tensor] = {}

    def add(self, window: int, x: torch.Tensor) -> None:
        """Keeps x [tokens, channels] of a window."""
        self._sequences[window] = x.clone()

    def columns_kept(self, threshold: float) -> dict[int, float]:
        """The share of columns that LLM.int8() keeps in 16 bits, those with any |x| >= threshold, by window."""
        return {window: is_outlier(x, threshold).any(0).double().mean().item() for window, x in self._sequences.items()}

    def damage(
        self, modules: Mapping[str, nn.Module], methods: Mapping[str, Method], threshold: float, step: int
    ) -> dict[str, Damage] | None:
        """Each method's damage over all `modules`, by the method's name. None where no module has a weight [out_features,
        in_features]: fused experts have none. Weights must be loaded.

        Activations are rounded sequence by sequence. Outputs are those of every `step`th token.
        """
        weights = [weight for module in modules.values() if (weight := weight_of(module)) is not None]
        if not weights:
            return None
        found = {name: Damage() for name in methods}
        sequences = [x.float() for _, x in sorted(self._sequences.items())]
        outliers = [is_outlier(x, threshold).any(0) for x in sequences]
        for weight in map(torch.Tensor.contiguous, weights):  # a Conv1D's is stored transposed
            wide = weight.float()
            whole = [_parts(x[self.prefix :: step], wide, o) for x, o in zip(sequences, outliers)]
            del wide  # a layer of a large model has hundreds of megabytes
            for name, method in methods.items():
                simulated = simulate(method, weight)
                for x, outlier, parts in zip(sequences, outliers, whole):
                    rounded, kept = simulated.activations(x)
                    found[name].add(parts, _parts(rounded[self.prefix :: step], simulated.weight_for(kept), outlier))
                del simulated
        return found


def _parts(x: torch.Tensor, weight: torch.Tensor, outlier: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x W^T, the part of it through channels that are not `outlier`)."""
    if not outlier.any():
        y = x @ weight.t()
        return y, y
    ordinary = x.masked_fill(outlier, 0.0) @ weight.t()
    return ordinary + x[:, outlier] @ weight[:, outlier].t(), ordinary


def weight_of(module: nn.Module) -> torch.Tensor | None:
    """The unquantized weight [out_features, in_features] of a linear module; None for any other module."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        return None
    return weight if isinstance(module, nn.Linear) else weight.t()
