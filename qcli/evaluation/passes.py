"""Windows of text through a streamed model up to its head, and from there, a few tokens at a time, into scores."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qcli.corpus import Window
from qcli.errors import NonFiniteError
from qcli.evaluation.tokens import TokenScores, log_probabilities
from qcli.nn import Linear8bit
from qcli.streaming.batches import BATCH_TOKENS, make_batches
from qcli.streaming.head import Head
from qcli.streaming.run import Call, Observer, current_call, run_calls
from qcli.streaming.skeleton import Skeleton
from qcli.streaming.units import Unit

Advance = Callable[[int, str], None]

_LOGITS, _ROWS = 1 << 24, 2048  # at a time at most, of so many tokens, unless 16 have more
HIDDEN_BYTES = 2 << 30  # of hidden states that wait together; what has more is read in several goes


def weight_bytes(unit: Unit) -> int:
    """Bytes of a unit's weights in memory, by which progress is counted."""
    return sum(p.numel() * p.element_size() for p in unit.module.parameters())


def hidden_bytes(skeletons: Sequence[Skeleton], windows: Sequence[Window], variants: int = 1) -> int:
    """Bytes of the hidden states that wait together when the models, each in so many variants, read the windows.

    A token's waits twice: as what the model began with, which transformers keeps, and as what a block has made.
    """
    width = sum(2 * s.model.config.get_text_config(decoder=True).hidden_size * s.dtype.itemsize for s in skeletons)
    return width * variants * sum(len(window.ids) for window in windows)


def goes(skeletons: Sequence[Skeleton], windows: Sequence[Window], variants: int = 1) -> list[Sequence[Window]]:
    """The windows in as few runs as HIDDEN_BYTES allows: every model's weights are read once for each of them."""
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


class Reading:
    """Windows that a model has read up to its head, in one or more variants of it. Of each token and variant it keeps the last
    hidden state.

    `observer` is told of each unit. `padded` puts windows of unlike length into one call, else only those of one length are
    read together; `alone` gives each a call of its own, as a model in 8 bits has it always. `advance` hears of finished work,
    which is `work` in all once the reading has been scored.
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
    ):
        self.skeleton, self.head, self.advance = skeleton, Head(skeleton), advance
        self._broken: dict[tuple[str, str], torch.Tensor] = {}
        # LLM.int8() takes the outlier columns of all tokens of a call, which must be those of one text.
        alone = alone or any(isinstance(module, Linear8bit) for module in skeleton.model.modules())
        batches = make_batches([window.ids for window in windows], 0 if padded else None, 1 if alone else BATCH_TOKENS)
        calls = [Call(self.head.below(batch), variant, batch) for variant in variants for batch in batches]
        handles = [unit.module.register_forward_hook(self._watch(unit)) for unit in skeleton.blocks]
        counting = _Counting(observer or Observer(), advance)
        try:
            with self.head.stopping():
                outputs = run_calls(skeleton, calls, counting)
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
        """What `advance` is told of in all."""
        return sum(weight_bytes(unit) for unit in skeleton.units if not unit.resident)

    def _watch(self, unit: Unit) -> Callable:
        def watch(module, args, output):
            if (call := current_call()) is not None:
                hidden = output[0] if isinstance(output, tuple) else output
                key = call.variant, unit.name
                broken = (
                    ~torch.stack(hidden.aminmax()).isfinite().all()
                )  # one pass: NaN is the extreme where there is any
                self._broken[key] = self._broken.get(key, broken) | broken  # nothing waits for the device here

        return watch

    def logits(self, variant: str, pieces: Sequence["Piece"]) -> torch.Tensor:
        """[tokens, vocabulary] of pieces of windows, one after another. The head must be loaded."""
        return self.head.logits([(*self._places[variant, p.window], p.first, p.first + len(p.ids)) for p in pieces])

    def where_broken(self, variant: str) -> str:
        """The first block with an output that is not finite, in words."""
        names = [unit.name for unit in self.skeleton.blocks if bool(self._broken.get((variant, unit.name), False))]
        return (
            f"the first values that are not finite come out of {names[0]}" if names else "its blocks give finite ones"
        )


class _Counting(Observer):
    """Passes on what it is told, and counts the weights that are done with."""

    def __init__(self, observer: Observer, advance: Advance):
        self.observer, self.advance, self.counted = observer, advance, 0
        self.loaded, self.variant = observer.loaded, observer.variant

    def passed(self, unit: Unit) -> None:
        """Every call has passed `unit`."""
        self.observer.passed(unit)
        self.counted += weight_bytes(unit)
        self.advance(weight_bytes(unit), unit.name)


@dataclass(frozen=True)
class Piece:
    """Scored tokens `ids` [tokens] of a window, which positions `first` onwards predict; `last` where the window ends with them."""

    window: int
    first: int
    ids: torch.Tensor
    last: bool


def pieces_of(windows: Sequence[Window], rows: int) -> Iterator[list[Piece]]:
    """Every scored token, as many windows at a time as have `rows` tokens, or so much of one."""
    found: list[Piece] = []
    room = rows
    for number, window in enumerate(windows):
        ids, start = torch.tensor(window.ids[window.context :]), 0
        while start < len(ids):
            part = ids[start : start + room]
            found.append(Piece(number, window.context - 1 + start, part, start + len(part) == len(ids)))
            start, room = start + len(part), room - len(part)
            if not room:
                yield found
                found, room = [], rows
    if found:
        yield found


@dataclass(frozen=True)
class Form:
    """A model, or a variant of one, after its reading. `name` is for messages, and so is `before`: windows of goes before."""

    name: str
    reading: Reading
    variant: str = ""
    before: int = 0

    def tell(self, scores: TokenScores, start: int, pieces: Sequence[Piece], base: torch.Tensor | None) -> torch.Tensor:
        """Scores pieces of windows as tokens `start` onwards. Returns their logits. Raises NonFiniteError."""
        logits, ids = self.reading.logits(self.variant, pieces), torch.cat([piece.ids for piece in pieces])
        scores.tell(start, logits, ids.to(logits.device), base)
        broken = ~np.isfinite(scores.loss[start : start + len(ids)])
        if broken.any():
            place = int(broken.argmax())
            owners = [(piece, i) for piece in pieces for i in range(len(piece.ids))]
            piece, i = owners[place]
            raise NonFiniteError(
                f"{self.name}: the logits for token {piece.first + 1 + i} of window "
                f"{self.before + piece.window + 1} are not finite; "
                f"{self.reading.where_broken(self.variant)}",
                "Try --dtype float32; where that does not help, a weight is damaged.",
            )
        return logits


def score(
    base: Form | None, others: Sequence[Form], windows: Sequence[Window]
) -> tuple[TokenScores | None, list[TokenScores]]:
    """The scores of every scored token, in the order of `windows`: of the base, and of others, compared with it if there is one.

    Raises NonFiniteError, which names token, window and block.
    """
    forms = [*others, *([base] if base else [])]
    count = sum(window.scored for window in windows)
    of_base = TokenScores(count) if base else None
    scores = [TokenScores(count, compared=base is not None) for _ in others]
    readings = {id(form.reading): form.reading for form in forms}.values()
    for reading in readings:
        reading.skeleton.load(reading.head.unit)
    vocabulary = max(reading.head.unit.module.weight.shape[0] for reading in readings)
    rows = max(min(_LOGITS // vocabulary, _ROWS), 16)
    start = 0
    for pieces in pieces_of(windows, rows):
        logp = log_probabilities(base.tell(of_base, start, pieces, None)) if base else None
        for form, told in zip(others, scores):
            form.tell(told, start, pieces, logp)
        start += sum(len(piece.ids) for piece in pieces)
        for number in (piece.window for piece in pieces if piece.last):
            for reading in readings:
                unit = reading.head.unit
                reading.advance(
                    weight_bytes(unit) // len(windows), f"{unit.name}, window {number + 1} of {len(windows)}"
                )
    for reading in readings:
        reading.skeleton.unload(reading.head.unit)
    return of_base, scores


def score_all(
    goes: Sequence[Sequence[Window]], read: Callable[[Sequence[Window], int], tuple[Form | None, Sequence[Form]]]
) -> list[TokenScores]:
    """`score` of one go after another, and what they found joined: the base first, where there is one. `read(windows, before)`
    runs the models and returns (base, others)."""
    parts, before = [], 0
    for windows in goes:
        base, others = read(windows, before)
        of_base, of_others = score(base, others, windows)
        parts.append([of_base, *of_others] if of_base else of_others)
        before += len(windows)
    return [TokenScores.joined(found) for found in zip(*parts)]
