"""Compares the readings of a model's layers (structure.py) with what transformers computed, and chooses the one that is right."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qcli.generation.first_prompt import Seen
from qcli.generation.lean_step import Caches
from qcli.generation.step import Unsupported
from qcli.generation.structure import ROPES, Block, Norm
from qcli.ops.norm import norm

# The largest difference, as a share of what is compared. transformers rounds each step of a layer to the model's dtype.
_SHARES = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
_INT8_ACTIVATIONS = 0.1  # the share if transformers' products round activations to int8
_CLEARLY = 0.5  # a reading without rotation must err so much less than one with it
_LAYERS = 6  # layers on which all kinds of rotation are tried


@dataclass(frozen=True)
class Tolerance:
    """Differences that rounding explains, for a model of `dtype`; `rounds` if its products round activations to int8."""

    dtype: torch.dtype
    rounds: bool

    def error(self, ours: torch.Tensor, theirs: torch.Tensor, added: torch.Tensor) -> float:
        """The largest difference of [tokens, n] as a multiple of what is allowed: up to 1 they agree. `added` is what was computed
        last, apart from a residual stream. Infinite for NaN."""
        share = max(_SHARES[self.dtype], _INT8_ACTIVATIONS if self.rounds else 0.0)
        bound = share * added.norm(dim=-1) + torch.finfo(self.dtype).eps * theirs.norm(dim=-1)
        found = ((ours - theirs).norm(dim=-1) / bound.clamp_min(1e-30)).max().item()
        return found if found == found else float("inf")

    def agree(self, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
        """Whether [tokens, n] are equal but for rounding."""
        return self.error(ours, theirs, theirs) <= 1


def known(dtype: torch.dtype) -> bool:
    """Whether there is a tolerance for a model of `dtype`."""
    return dtype in _SHARES


def choose(
    readings: list[list[Block]], seen: Seen, caches: Caches, tables: list, start: int, tolerance: Tolerance, run_layer: Callable
) -> list[Block]:
    """The reading of each layer that agrees with what was seen of the tokens from `start` on. Raises Unsupported if none does.

    `run_layer` runs a reading, as the one of lean_step.py does.

    A layer's output hardly depends on attention where attention adds little, so attention is compared by itself, too. All layers
    that rotate do it in the same way, which is found on the first few. A layer with tables may still not rotate (SmolLM3).
    """

    def differing(i: int, rope: str | None) -> float:
        """How far attention is from that of layer i."""
        block = next(block for block in readings[i] if block.attention.rope == rope)
        if (i, rope) not in known:
            known[i, rope] = _error(block, i, seen, caches, tables, start, tolerance, run_layer, attention_only=True)
        return known[i, rope]

    known: dict[tuple[int, str | None], float] = {}
    turning = [i for i in range(len(readings)) if tables[i] is not None]
    kinds = [rope for rope in ROPES if rope is not None]
    tried = {rope: [differing(i, rope) for i in turning[:_LAYERS]] for rope in kinds if turning}
    # The number of layers with an error that is not clearly larger than the best.
    best = [min(column) for column in zip(*tried.values())]
    near = {rope: sum(error <= one / _CLEARLY for error, one in zip(row, best)) for rope, row in tried.items()}
    rope = max(kinds, key=lambda kind: near[kind]) if turning else None
    chosen = []
    for i in range(len(readings)):
        turns = tables[i] is not None and differing(i, None) >= _CLEARLY * differing(i, rope)
        error, block = float("inf"), None
        for each in readings[i]:
            if each.attention.rope == (rope if turns else None):
                found = _error(each, i, seen, caches, tables, start, tolerance, run_layer)
                error, block = min((error, block), (found, each), key=lambda pair: pair[0])
        if block is None or error > 1:
            raise Unsupported
        chosen.append(block)
    return chosen


def _error(
    block: Block,
    i: int,
    seen: Seen,
    caches: Caches,
    tables: list,
    start: int,
    tolerance: Tolerance,
    run_layer: Callable,
    attention_only: bool = False,
) -> float:
    """How far a reading is from layer i: the larger error of attention's and the layer's output."""
    x, attended, output = (kept[i][0].float() for kept in (seen.inputs, seen.attended, seen.outputs))
    cache = caches.layers[i]
    slots = torch.arange(start, start + len(x)) % cache.capacity
    before = [tensor[:, slots] for tensor in cache.tensors]
    ours, ours_output = run_layer(block, cache, caches.windows[i], tables[i], x, start, attention_only)
    for tensor, rows in zip(cache.tensors, before):  # a wrong reading leaves wrong keys
        tensor[:, slots] = rows
    if block.attention_out is not None:
        attended = _normed(attended, block.attention_out)
    error = tolerance.error(ours, attended, attended)
    return error if attention_only else max(error, tolerance.error(ours_output, output, output - x))


def _normed(x: torch.Tensor, how: Norm) -> torch.Tensor:
    weight, bias = (None if each is None else each.to(x.device) for each in (how.weight, how.bias))
    return norm(x, None, weight, bias, how.eps, how.centered)[0]
