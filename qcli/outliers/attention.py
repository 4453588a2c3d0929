"""Attention probabilities of a block under transformers' eager attention, with and without some dimensions of its input.

Zeroing does not propagate. Each layer's attention runs on its regular input, once as it is and once more for each set of zeroed
dimensions. Only the regular output is passed on (LLM.int8(), arXiv:2208.07339, section 4.2).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from qcli.streaming.batches import Batch
from qcli.streaming.run import current_call

SINK = 0.3  # a head whose mean attention to the first token is above this has a sink (arXiv:2410.10781)


@dataclass
class LayerAttention:
    """Sums over one layer: of each row's largest probability, by what was zeroed; and of the first token's share, by head."""

    top1: dict[str, float] = field(default_factory=dict)
    rows: int = 0
    first: torch.Tensor | None = None  # [heads], sums over queries
    queries: int = 0

    def mean_top1(self, name: str) -> float | None:
        """Mean over heads and positions of the largest probability."""
        return self.top1[name] / self.rows if self.rows else None

    @property
    def sinks(self) -> tuple[int, int]:
        """(heads with a sink on the first token, heads)."""
        if self.first is None or not self.queries:
            return 0, 0
        return int((self.first / self.queries > SINK).sum()), len(self.first)


class AttentionMeter:
    """Hooks the attention modules of a block. `inputs` are the linear modules that read its input. `dims` maps names to the
    dimensions to zero."""

    def __init__(
        self, block: nn.Module, inputs: Mapping[str, nn.Module], dims: Mapping[str, torch.Tensor], prefix: int, variant: str
    ):
        self.result = LayerAttention(dict.fromkeys(["with", *dims], 0.0))
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
        self._note_first(probabilities, call.batch)
        for name, dims in self._dims.items():
            self._zeroed = dims
            try:
                self._note(name, _probabilities(module.forward(*args, **kwargs)), counted)
            finally:
                self._zeroed = None

    def _note(self, name: str, probabilities: torch.Tensor, counted: torch.Tensor) -> None:
        top1 = probabilities.amax(-1).transpose(1, 2)[counted]  # [rows, heads]
        self.result.top1[name] += top1.double().sum().item()

    def _note_first(self, probabilities: torch.Tensor, batch: Batch) -> None:
        later = batch.counted(1).to(probabilities.device)
        shares = probabilities[..., 0].transpose(1, 2)[later].double().sum(0).cpu()
        self.result.first = shares if self.result.first is None else self.result.first + shares
        self.result.queries += int(later.sum())


def zero_dims(x: torch.Tensor, dims: torch.Tensor) -> torch.Tensor:
    """x [..., hidden] with `dims` zeroed."""
    return x.index_fill(-1, dims.to(x.device), 0.0)


def _probabilities(output: object) -> torch.Tensor | None:
    """The attention probabilities [sequences, heads, tokens, tokens] among what an attention module returns."""
    if not isinstance(output, tuple):
        return None
    found = [x for x in output[1:] if isinstance(x, torch.Tensor) and x.dim() == 4 and x.shape[-1] == x.shape[-2]]
    return found[0] if found else None
