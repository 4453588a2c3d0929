"""The paper's experiment: zero the outlier dimensions and see what breaks (arXiv:2208.07339, section 4.2 and appendix).

There are two measurements, each with as many random dimensions as a control. Without propagation: how sharp attention stays, layer
by layer. With propagation: the perplexity of the model when every attention and every FFN gets its input without the dimensions.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from qcli.calibration.reported_columns import ATTENTION_INPUT, HIDDEN
from qcli.outliers.attention import AttentionMeter, LayerAttention, zero_dims
from qcli.outliers.inspection import Attention, LayerTop1
from qcli.outliers.measure import LayerMeasure
from qcli.outliers.sites import linear_modules, shown_path
from qcli.streaming.run import Observer
from qcli.streaming.units import Unit

WHOLE = "whole"
WITHOUT, RANDOM = "without", "random"


def random_dims(hidden_size: int, taken: Sequence[int], count: int, seed: int = 0) -> list[int]:
    """`count` dimensions that are not in `taken`, the same ones at each call."""
    order = torch.randperm(hidden_size, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted([dim for dim in order if dim not in set(taken)][:count])


class Ablation(Observer):
    """Zeroes dimensions at every site of the hidden state, in the calls of the variants that `dims` names. Measures attention in
    the calls of the variant WHOLE. `layers` are those of the measuring pass. `attention` is the result, by layer."""

    def __init__(self, layers: Sequence[LayerMeasure], dims: Mapping[str, Sequence[int]], prefix: int):
        self._layers = {layer.name: layer for layer in layers}
        self._dims = {name: torch.tensor(chosen) for name, chosen in dims.items()}
        self._prefix = prefix
        self.attention: list[LayerAttention] = []

    def loaded(self, unit: Unit) -> None:
        """Hooks a block's attention."""
        if unit.name in self._layers:
            inputs = self._modules(unit, (ATTENTION_INPUT,))
            self._meter = AttentionMeter(unit.module, inputs, self._dims, self._prefix, WHOLE)

    def passed(self, unit: Unit) -> None:
        """Takes a block's hooks off."""
        if unit.name in self._layers:
            self.attention.append(self._meter.close())

    @contextmanager
    def variant(self, unit: Unit, name: str) -> Iterator[None]:
        """Zeroes the dimensions of the variant."""
        if unit.name not in self._layers or name == WHOLE:
            yield
            return
        dims = self._dims[name]
        handles = [
            module.register_forward_pre_hook(lambda m, args: (zero_dims(args[0], dims), *args[1:]))
            for module in self._modules(unit, HIDDEN).values()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _modules(self, unit: Unit, kinds: Sequence[str]) -> dict:
        """The linear modules of a block at sites of these kinds, by path."""
        shown = {path for s in self._layers[unit.name].sites if s.site.kind in kinds for path in s.site.modules}
        return {path: module for path, module in linear_modules(unit.module).items() if shown_path(path) in shown}


def mean_top1(layers: Sequence[LayerAttention]) -> dict[str, float] | None:
    """Mean largest attention probability over heads, positions and layers, by what was zeroed; None where none was seen."""
    rows = sum(layer.rows for layer in layers)
    if not rows:
        return None
    return {name: sum(layer.top1[name] for layer in layers) / rows for name in ("with", WITHOUT, RANDOM)}


def describe_attention(layers: Sequence[LayerAttention]) -> Attention | None:
    """What the report says of attention; None where no probabilities were seen."""
    top1 = mean_top1(layers)
    if top1 is None:
        return None
    sinks = [layer.sinks for layer in layers]
    return Attention(
        sink_share=sum(s for s, _ in sinks) / max(sum(heads for _, heads in sinks), 1),
        top1=top1["with"],
        layers=[LayerTop1(i, *(layer.mean_top1(name) for name in ("with", WITHOUT, RANDOM))) for i, layer in enumerate(layers)],
    )
