"""Windows of text through a streamed model up to its head: the last hidden state of each token, and logits on demand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qcli.loading.tokenizer import check_ids
from qcli.nn.quantized_linear import QuantizedLinear
from qcli.progress import Advance
from qcli.streaming.batches import BATCH_TOKENS, make_batches
from qcli.streaming.corpus import Window
from qcli.streaming.head import Head
from qcli.streaming.run import Call, Observer, current_call, run_calls
from qcli.streaming.skeleton import Skeleton
from qcli.streaming.units import Unit

LEADING = "leading"  # the variant of windows that are read and not scored
HIDDEN_BYTES = 2 << 30  # of hidden states that wait together; a text with more is read in several runs


def weight_bytes(unit: Unit) -> int:
    """Bytes of a unit's weights in memory, by which progress is counted."""
    return sum(p.numel() * p.element_size() for p in unit.module.parameters())


def hidden_bytes(skeletons: Sequence[Skeleton], windows: Sequence[Window], variants: int = 1) -> int:
    """Bytes of the hidden states that wait together when the models, each in `variants` variants, read the windows.

    Each token has two: the one that the model began with, which transformers keeps, and the one that the last block made.
    """
    width = sum(2 * s.model.config.get_text_config(decoder=True).hidden_size * s.dtype.itemsize for s in skeletons)
    return width * variants * sum(len(window.ids) for window in windows)


def runs(skeletons: Sequence[Skeleton], windows: Sequence[Window], variants: int = 1) -> list[Sequence[Window]]:
    """The windows in as few runs as HIDDEN_BYTES allows. Each run reads every model's weights once."""
    found: list[list[Window]] = []
    room = 0
    for window in windows:
        size = hidden_bytes(skeletons, [window], variants)
        if size > room or not found:
            found.append([])
            room = HIDDEN_BYTES
        found[-1].append(window)
        room -= size
    return found


@dataclass(frozen=True)
class Piece:
    """Scored tokens `ids` [tokens] of a window, which positions `first` onwards predict; `last` where the window ends with them."""

    window: int
    first: int
    ids: torch.Tensor
    last: bool


class Reading:
    """Windows that a model, in one or more variants, has read up to its head. It keeps the last hidden state of each token and
    variant.

    `observer` is called at each unit. With `padded`, windows of different lengths share a call; without, only windows of one
    length do. With `alone`, each window has its own call; a model in 8 bits always reads so. `advance` is called with finished
    work, which adds up to `work` once the reading has been scored. The windows of `leading` pass each unit before all others, as
    the variant LEADING, and nothing is kept of them.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        windows: Sequence[Window],
        advance: Advance,
        *,
        variants: Sequence[str] = ("",),
        observer: Observer | None = None,
        padded: bool = True,
        alone: bool = False,
        leading: Sequence[Window] = (),
    ):
        self.skeleton, self.head, self.advance = skeleton, Head(skeleton), advance
        for window in (*windows, *leading):
            check_ids(skeleton.model, skeleton.tokenizer, window.ids)
        self._broken: dict[tuple[str, str], torch.Tensor] = {}
        alone = alone or any(m.one_text_a_call for m in skeleton.model.modules() if isinstance(m, QuantizedLinear))
        batches = make_batches([window.ids for window in windows], 0 if padded else None, 1 if alone else BATCH_TOKENS)
        calls = [Call(self.head.below(batch), variant, batch) for variant in variants for batch in batches]
        first = [Call(self.head.below(batch), LEADING, batch) for batch in make_batches([window.ids for window in leading], None)]
        handles = [unit.module.register_forward_hook(self._watch(unit)) for unit in skeleton.blocks]
        counting = _Counting(observer or Observer(), advance)
        try:
            with self.head.stopping():
                outputs = run_calls(skeleton, [*first, *calls], counting)[len(first) :]
        finally:
            for handle in handles:
                handle.remove()
        unentered = self.work(skeleton) - counting.counted
        advance(unentered - weight_bytes(self.head.unit), "units that text does not enter")
        self._places: dict[tuple[str, int], tuple[Any, int]] = {}
        for call, output in zip(calls, outputs):
            for row, window in enumerate(call.batch.windows):
                self._places[call.variant, window] = output, row

    @staticmethod
    def work(skeleton: Skeleton) -> int:
        """The bytes that the calls of `advance` add up to."""
        return sum(weight_bytes(unit) for unit in skeleton.units if not unit.resident)

    def _watch(self, unit: Unit) -> Callable:
        def watch(module, args, output):
            if (call := current_call()) is not None:
                hidden = output[0] if isinstance(output, tuple) else output
                key = call.variant, unit.name
                broken = ~torch.stack(hidden.aminmax()).isfinite().all()  # one pass: a NaN anywhere is the extreme
                self._broken[key] = self._broken.get(key, broken) | broken  # a tensor still: nothing waits for the device here

        return watch

    def logits(self, variant: str, pieces: Sequence[Piece]) -> torch.Tensor:
        """Logits [tokens, vocabulary] of pieces of windows, one after another. The head must be loaded."""
        return self.head.logits([(*self._places[variant, p.window], p.first, p.first + len(p.ids)) for p in pieces])

    def where_broken(self, variant: str) -> str:
        """The first block with an output that is not finite, in words."""
        names = [unit.name for unit in self.skeleton.blocks if bool(self._broken.get((variant, unit.name), False))]
        return f"the first values that are not finite come out of {names[0]}" if names else "its blocks give finite ones"


class _Counting(Observer):
    """Passes every call on to `observer`, and counts the weights of finished units."""

    def __init__(self, observer: Observer, advance: Advance):
        self.observer, self.advance, self.counted = observer, advance, 0
        self.loaded, self.variant = observer.loaded, observer.variant

    def passed(self, unit: Unit) -> None:
        """Every call has passed `unit`."""
        self.observer.passed(unit)
        self.counted += weight_bytes(unit)
        self.advance(weight_bytes(unit), unit.name)
