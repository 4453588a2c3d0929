"""Massive activations (Sun et al., arXiv:2402.17762) and the super weights behind them (Yu et al., arXiv:2411.07191).

Outlier features are large in nearly every token; these are a handful of values, a thousand times the median, at few tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from qcli.nn import Linear4bit, Linear8bit
from qcli.streaming.run import current_call

MASSIVE = 100.0  # magnitude, and
MASSIVE_RATIO = 1000.0  # times the median magnitude of the hidden state (section 2 of the paper)
SUPER_SHARE = 0.5  # of an output spike, by one weight alone
_MOST = 32  # massive activations kept of one hidden state


@dataclass(frozen=True)
class Massive:
    """One value of a hidden state [tokens, dims]; `median` is that of the state's magnitudes."""

    window: int
    position: int
    dim: int
    value: float
    median: float


def massive(hidden: torch.Tensor, window: int) -> tuple[float, list[Massive]]:
    """(median of |hidden|, its massive activations, largest first) of hidden [tokens, dims]."""
    magnitudes = hidden.float().abs()
    median = magnitudes.median().item()
    limit = max(MASSIVE, MASSIVE_RATIO * median)
    where = ((magnitudes > MASSIVE) & (magnitudes >= limit)).nonzero().tolist()
    found = [Massive(window, p, d, hidden[p, d].item(), median) for p, d in where]
    return median, sorted(found, key=lambda m: (-abs(m.value), m.position, m.dim))[:_MOST]


@dataclass(frozen=True)
class SuperWeight:
    """The weight [row, column] of `module`, whose product with the input spike makes most of the output spike."""

    module: str
    row: int
    column: int
    weight: float
    input: float
    output: float


class SpikeFinder:
    """Notes the largest output of each linear layer of a block, and the largest input at the same token."""

    def __init__(self):
        # module -> (|output|, row, output, column, input, median of |output|)
        self._largest: dict[int, tuple[float, int, float, int, float, float]] = {}

    def hook(self, block: nn.Module) -> list:
        """Hooks every linear layer of the block; returns the hooks' handles."""
        from qcli.outliers.sites import linear_modules

        return [m.register_forward_hook(self._note) for m in linear_modules(block).values() if hasattr(m, "weight")]

    def _note(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if current_call() is None or not output.numel():
            return
        y = output.reshape(-1, output.shape[-1])
        place = int(y.abs().argmax())
        token, row = divmod(place, y.shape[1])
        value = y[token, row].item()
        before = self._largest.get(id(module))
        if abs(value) <= MASSIVE or (before is not None and before[0] >= abs(value)):
            return
        x = args[0].reshape(-1, args[0].shape[-1])[token]
        column = int(x.abs().argmax())
        median = y.float().abs().median().item()
        self._largest[id(module)] = (abs(value), row, value, column, x[column].item(), median)

    def super_weights(self, modules: Mapping[str, nn.Module]) -> list[SuperWeight]:
        """Of the given modules, path to module: the FFN's last ones, where they have been seen. Weights must be loaded."""
        found = []
        for path, module in modules.items():
            if id(module) not in self._largest:
                continue
            magnitude, row, output, column, x, median = self._largest[id(module)]
            weight = _weight_at(module, row, column)
            if magnitude >= MASSIVE_RATIO * median and abs(weight * x) >= SUPER_SHARE * magnitude:
                found.append(SuperWeight(path, row, column, weight, x, output))
        return found


def _weight_at(module: nn.Module, row: int, column: int) -> float:
    if isinstance(module, (Linear4bit, Linear8bit)):
        return module.dequantize(torch.float32)[row, column].item()
    return module.weight[row, column].item() if isinstance(module, nn.Linear) else module.weight[column, row].item()
