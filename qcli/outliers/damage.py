"""What rounding weights and activations does to the outputs of the linear layers at a site.

The global SQNR hides the damage: outliers carry most of the power and are rounded well. It is therefore measured a second time,
over what reaches the outputs through the other channels alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from qcli.methods._method import Method
from qcli.methods.errors import decibels
from qcli.methods.simulate import simulate
from qcli.outliers.statistics import is_outlier

METHODS = ("int8-per-tensor", "int8-row-wise", "int8", "llm-int8", "nf4")  # of qcli.schemes, whose damage is measured
SAMPLE_TOKENS = 512  # rounding is measured at about so many outputs, of the first windows with this many tokens


@dataclass
class Damage:
    """Sums of squares over outputs: of all channels, and of the channels without an outlier in their sequence."""

    signal: float = 0.0
    error: float = 0.0
    ordinary_signal: float = 0.0
    ordinary_error: float = 0.0

    @property
    def output(self) -> float | None:
        """10 log10(||Y||^2 / ||Y - Y^||^2) in dB; None where nothing was lost or there is nothing."""
        return decibels(self.signal, self.error)

    @property
    def ordinary(self) -> float | None:
        """The same for the part that comes through ordinary channels."""
        return decibels(self.ordinary_signal, self.ordinary_error)


class SampleOf:
    """Inputs of a site, sequence by sequence. The first `prefix` tokens of each are rounded with the others and not measured."""

    def __init__(self, prefix: int):
        self.prefix = prefix
        self._sequences: dict[int, torch.Tensor] = {}

    def add(self, window: int, x: torch.Tensor) -> None:
        """Keeps x [tokens, channels] of a window."""
        self._sequences[window] = x.clone()

    def columns_kept(self, threshold: float) -> float:
        """The share of columns that LLM.int8() keeps in 16 bits, those with any |x| >= threshold: the mean over sequences."""
        shares = [is_outlier(x, threshold).any(0).double().mean().item() for x in self._sequences.values()]
        return sum(shares) / len(shares)

    def damage(self, modules: Mapping[str, nn.Module], methods: Mapping[str, Method], threshold: float) -> dict[str, Damage] | None:
        """Each method's damage over all `modules`, by the method's name. None where no module has a weight [out_features,
        in_features]: fused experts have none. Weights must be loaded.

        Activations are rounded sequence by sequence. Outputs are those of every few tokens, SAMPLE_TOKENS in all.
        """
        weights = [weight for module in modules.values() if (weight := weight_of(module)) is not None]
        if not weights:
            return None
        found = {name: Damage() for name in methods}
        sequences = [x.float() for _, x in sorted(self._sequences.items())]
        outliers = [is_outlier(x, threshold).any(0) for x in sequences]
        step = -(-sum(len(x) - self.prefix for x in sequences) // SAMPLE_TOKENS)
        for weight in map(torch.Tensor.contiguous, weights):  # a Conv1D's is stored transposed
            wide = weight.float()
            whole = [_parts(x[self.prefix :: step], wide, o) for x, o in zip(sequences, outliers)]
            del wide  # a layer of a large model has hundreds of megabytes
            for name, method in methods.items():
                simulated = simulate(method, weight)
                for x, outlier, parts in zip(sequences, outliers, whole):
                    rounded, kept = simulated.activations(x)
                    _note(found[name], parts, _parts(rounded[self.prefix :: step], simulated.weight_for(kept), outlier))
                del simulated
        return found


def _note(damage: Damage, whole: tuple[torch.Tensor, torch.Tensor], rounded: tuple[torch.Tensor, torch.Tensor]) -> None:
    def power(x: torch.Tensor) -> float:
        return x.square().sum(dtype=torch.float64).item()

    damage.signal += power(whole[0])
    damage.error += power(whole[0] - rounded[0])
    damage.ordinary_signal += power(whole[1])
    damage.ordinary_error += power(whole[1] - rounded[1])


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
