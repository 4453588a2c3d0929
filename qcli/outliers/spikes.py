"""Massive activations (Sun et al., arXiv:2402.17762) and the super weights behind them (Yu et al., arXiv:2411.07191).

Outlier features are large at nearly every token. Massive activations are a few values, a thousand times the median, at few tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from qcli.nn.quantized_linear import QuantizedLinear
from qcli.outliers.sites import linear_modules
from qcli.streaming.batches import Batch
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

    layer: int
    module: str
    row: int
    column: int
    weight: float
    input: float
    output: float


@dataclass(frozen=True)
class Spike:
    """A linear layer's largest output in magnitude, `value`, met at `place` in the text, with the weights behind it."""

    value: float
    place: tuple[int, ...]
    super_weights: tuple[SuperWeight, ...] = ()

    @property
    def order(self) -> tuple[float, tuple[int, ...]]:
        """The least is the spike of both: the larger one, or the earlier of equal ones."""
        return -self.value, self.place


@dataclass(frozen=True)
class _Token:
    """A token at which a layer has a spike: input [in_features], output [out_features] and median of |outputs|, float32."""

    spike: Spike
    input: torch.Tensor
    output: torch.Tensor
    median: float


class SpikeFinder:
    """Keeps the token at which each linear layer of a block gives its largest output, with its input and output there. `place` says
    where a batch is in the text."""

    def __init__(self, place: Callable[[Batch], tuple[int, ...]]):
        self._place = place
        self._largest: dict[int, _Token] = {}  # by the module's id

    def hook(self, block: nn.Module) -> list:
        """Hooks every linear layer of the block; returns the hooks' handles."""
        return [m.register_forward_hook(self._note) for m in linear_modules(block).values() if hasattr(m, "weight")]

    def _note(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        call = current_call()
        if call is None or not isinstance(output, torch.Tensor) or not output.numel():
            return
        x, y = args[0].reshape(-1, args[0].shape[-1]), output.reshape(-1, output.shape[-1])
        mask = call.batch.mask
        if len(y) == mask.numel() and not mask.all():
            real = mask.view(-1).to(y.device)
            x, y = x[real], y[real]
        token = int(y.abs().amax(1).argmax())
        value = y[token].abs().max().item()
        before = self._largest.get(id(module))
        if value <= MASSIVE or (before is not None and before.spike.value >= value):
            return
        spike = Spike(value, self._place(call.batch))
        self._largest[id(module)] = _Token(spike, x[token].float(), y[token].float(), y.float().abs().median().item())

    def spikes(self, layer: int, modules: Mapping[str, nn.Module]) -> dict[str, Spike]:
        """Those of `modules`, path to module, which are the last ones of the FFN of block `layer`. Weights must be loaded."""
        found = {}
        for path, module in modules.items():
            if (token := self._largest.get(id(module))) is not None:
                found[path] = replace(token.spike, super_weights=tuple(_super_weights(layer, path, module, token)))
        return found


def _super_weights(layer: int, path: str, module: nn.Module, token: _Token) -> Iterator[SuperWeight]:
    x, y = token.input, token.output
    rows = ((y.abs() > MASSIVE) & (y.abs() >= MASSIVE_RATIO * token.median)).nonzero().view(-1)
    for row, weights in zip(rows.tolist(), _rows(module, rows) if len(rows) else ()):
        column = int((weights * x).abs().argmax())
        weight, spike, output = weights[column].item(), x[column].item(), y[row].item()
        if abs(weight * spike) >= SUPER_SHARE * abs(output):
            yield SuperWeight(layer, path, row, column, weight, spike, output)


def _rows(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a linear layer's weight, float32 [rows, in_features]."""
    if isinstance(module, QuantizedLinear):
        return module.dequantize(torch.float32)[rows]
    return (module.weight[rows] if isinstance(module, nn.Linear) else module.weight[:, rows].t()).float()
