"""Attention probabilities of a block under transformers' eager attention, with and without some dimensions of its input.

Zeroing does not propagate. Each layer's attention runs on its regular input, once as it is and once more for each set of zeroed
dimensions. Only the regular output is passed on (LLM.int8(), arXiv:2208.07339, section 4.2).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from qcli.outliers.sums import WideSum
from qcli.streaming.run import current_call

SINK = 0.3  # a head whose mean attention to the first token is above this has a sink (arXiv:2410.10781)


class LayerAttention:
    """Sums over one layer: of each row's largest probability, by what was zeroed, which `names` say; and of the first token's
    share, by head."""

    def __init__(self, names: Iterable[str]):
        self.rows = self.queries = 0
        self._top1 = {name: WideSum() for name in names}
        self._first: WideSum | None = None  # [heads], over queries

    def add_top1(self, name: str, largest: torch.Tensor) -> None:
        """Adds the largest probability of each row, a tensor of any shape."""
        self._top1[name].add(largest.double().sum().cpu())

    def add_first(self, shares: torch.Tensor) -> None:
        """Adds the first token's share in each query, [queries, heads]."""
        if self._first is None:
            self._first = WideSum(shares.shape[1])
        self._first.add(shares.double().sum(0).cpu())
        self.queries += len(shares)

    def merge(self, other: "LayerAttention") -> None:
        """Adds the rows and queries of another."""
        self.rows, self.queries = self.rows + other.rows, self.queries + other.queries
        for name, mine in self._top1.items():
            mine.merge(other._top1[name])
        if self._first is None:
            self._first = other._first
        elif other._first is not None:
            self._first.merge(other._first)

    def top1(self, name: str) -> float:
        """The sum over heads and positions of the largest probability."""
        return self._top1[name].value.item()

    def mean_top1(self, name: str) -> float | None:
        """Mean over heads and positions of the largest probability."""
        return self.top1(name) / self.rows if self.rows else None

    @property
    def sinks(self) -> tuple[int, int]:
        """(heads with a sink on the first token, heads)."""
        if self._first is None or not self.queries:
            return 0, 0
        return int((self._first.value / self.queries > SINK).sum()), len(self._first.value)


class AttentionMeter:
    """Hooks the attention modules of a block. `inputs` are the linear modules that read its input. `dims` maps names to the
    dimensions to zero."""

    def __init__(
        self, block: nn.Module, inputs: Mapping[str, nn.Module], dims: Mapping[str, torch.Tensor], prefix: int, variant: str
    ):
        self.result = LayerAttention(["with", *dims])
        self._dims, self._prefix, self._variant = dims, prefix, variant
        self._zeroed: torch.Tensor | None = None
        parents = {path.rpartition(".")[0] for path in inputs} - {""}
        self._handles = [block.get_submodule(path).register_forward_hook(self._again, with_kwargs=True) for path in parents]
        self._handles += [module.register_forward_pre_hook(self._zero) for module in inputs.values()]

    def close(self) -> LayerAttention:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        return self.result

    def _zero(self, module: nn.Module, args: tuple):
        return None if self._zeroed is None else (zero_dims(args[0], self._zeroed), *args[1:])

    def _again(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        call = current_call()
        if call.variant != self._variant:
            return
        probabilities = _probabilities(output)
        if probabilities is None:
            return
        counted = call.batch.counted(max(self._prefix, 1)).to(probabilities.device)
        self.result.rows += int(counted.sum()) * probabilities.shape[1]
        self._note("with", probabilities, counted)
        later = call.batch.counted(1).to(probabilities.device)
        self.result.add_first(probabilities[..., 0].transpose(1, 2)[later])
        for name, dims in self._dims.items():
            self._zeroed = dims
            try:
                self._note(name, _probabilities(module.forward(*args, **kwargs)), counted)
            finally:
                self._zeroed = None

    def _note(self, name: str, probabilities: torch.Tensor, counted: torch.Tensor) -> None:
        self.result.add_top1(name, probabilities.amax(-1).transpose(1, 2)[counted])


def zero_dims(x: torch.Tensor, dims: torch.Tensor) -> torch.Tensor:
    """x [..., hidden] with `dims` zeroed."""
    return x.index_fill(-1, dims.to(x.device), 0.0)


def _probabilities(output: object) -> torch.Tensor | None:
    """The attention probabilities [sequences, heads, tokens, tokens] among what an attention module returns."""
    if not isinstance(output, tuple):
        return None
    found = [x for x in output[1:] if isinstance(x, torch.Tensor) and x.dim() == 4 and x.shape[-1] == x.shape[-2]]
    return found[0] if found else None
