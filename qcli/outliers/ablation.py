"""The paper's experiment: zero the outlier dimensions and see what breaks (arXiv:2208.07339, section 4.2 and appendix).

There are two measurements, each with as many random dimensions as a control. Without propagation: how sharp attention stays, layer
by layer. With propagation: the perplexity of the model when every attention and every FFN gets its input without the dimensions.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qcli.calibration.reported_columns import ATTENTION_INPUT, HIDDEN
from qcli.evaluation.score import Contender, score
from qcli.evaluation.tokens import TokenScores
from qcli.outliers.attention import AttentionMeter, LayerAttention, zero_dims
from qcli.outliers.inspection import Attention, LayerTop1
from qcli.outliers.measured import LayerMeasure
from qcli.outliers.sites import linear_modules, shown_path
from qcli.progress import Advance
from qcli.streaming.corpus import Window
from qcli.streaming.reading import Reading
from qcli.streaming.run import Observer
from qcli.streaming.skeleton import Skeleton
from qcli.streaming.units import Unit

WHOLE = "whole"
WITHOUT, RANDOM = "without", "random"


def random_dims(hidden_size: int, taken: Sequence[int], count: int, seed: int = 0) -> list[int]:
    """`count` dimensions that are not in `taken`, the same ones at each call."""
    order = torch.randperm(hidden_size, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted([dim for dim in order if dim not in set(taken)][:count])


@dataclass(frozen=True)
class Zeroing:
    """What is zeroed: `dims` by variant, at the inputs of modules, `readers` by block, kind of site and path there. The first
    `prefix` tokens of each window are not measured."""

    dims: dict[str, list[int]]
    readers: dict[str, dict[str, list[str]]]
    prefix: int

    @classmethod
    def of(cls, layers: Sequence[LayerMeasure], dims: dict[str, list[int]], prefix: int) -> "Zeroing":
        """At the sites that were measured."""
        readers: dict[str, dict[str, list[str]]] = {layer.name: {} for layer in layers}
        for layer in layers:
            for site in layer.sites:
                readers[layer.name].setdefault(site.kind, []).extend(site.modules)
        return cls(dims, readers, prefix)


@dataclass
class Zeroed:
    """What zeroing did: to attention, by block, and to the scores of each variant."""

    attention: dict[str, LayerAttention]
    scores: dict[str, TokenScores]

    def merge(self, other: "Zeroed") -> None:
        """Adds the attention in other windows."""
        for name, found in other.attention.items():
            if name in self.attention:
                self.attention[name].merge(found)
            else:
                self.attention[name] = found


def ablate(skeleton: Skeleton, windows: Sequence[Window], zeroing: Zeroing, advance: Advance) -> Zeroed:
    """Runs windows three times over: whole, without the dims, and without the random ones. Attention must be eager."""
    observer = Ablation(zeroing)
    variants = (WHOLE, *zeroing.dims)
    reading = Reading(skeleton, windows, advance, variants=variants, observer=observer)
    contenders = [Contender(f"{skeleton.source.label}, {variant}", reading, variant) for variant in variants]
    _, scores = score(None, contenders, windows)
    return Zeroed(observer.attention, dict(zip(variants, scores)))


class Ablation(Observer):
    """Zeroes dimensions at every site of the hidden state, in the calls of the variants that `zeroing` names. Measures attention in
    the calls of the variant WHOLE. `attention` is the result, by block."""

    def __init__(self, zeroing: Zeroing):
        self._readers, self._prefix = zeroing.readers, zeroing.prefix
        self._dims = {name: torch.tensor(chosen) for name, chosen in zeroing.dims.items()}
        self.attention: dict[str, LayerAttention] = {}

    def loaded(self, unit: Unit) -> None:
        """Hooks a block's attention."""
        if unit.name in self._readers:
            inputs = self._modules(unit, (ATTENTION_INPUT,))
            self._meter = AttentionMeter(unit.module, inputs, self._dims, self._prefix, WHOLE)

    def passed(self, unit: Unit) -> None:
        """Takes a block's hooks off."""
        if unit.name in self._readers:
            self.attention[unit.name] = self._meter.close()

    @contextmanager
    def variant(self, unit: Unit, name: str) -> Iterator[None]:
        """Zeroes the dimensions of the variant."""
        if unit.name not in self._readers or name == WHOLE:
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
        shown = {path for kind in kinds for path in self._readers[unit.name].get(kind, ())}
        return {path: module for path, module in linear_modules(unit.module).items() if shown_path(path) in shown}


def mean_top1(layers: Collection[LayerAttention]) -> dict[str, float] | None:
    """Mean largest attention probability over heads, positions and layers, by what was zeroed; None where none was seen."""
    rows = sum(layer.rows for layer in layers)
    if not rows:
        return None
    return {name: sum(layer.top1(name) for layer in layers) / rows for name in ("with", WITHOUT, RANDOM)}


def describe_attention(layers: Collection[LayerAttention]) -> Attention | None:
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
