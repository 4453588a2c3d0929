"""What streamed models predict for the tokens of windows, a few tokens at a time, as scores."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qcli.errors import NonFiniteError
from qcli.evaluation.tokens import TokenScores, log_probabilities
from qcli.streaming.corpus import Window
from qcli.streaming.reading import Piece, Reading, weight_bytes

_LOGITS, _ROWS = 1 << 24, 2048  # logits and tokens at a time, at most; 16 tokens at least


def pieces_of(windows: Sequence[Window], rows: int) -> Iterator[list[Piece]]:
    """Every scored token, in lists of `rows` tokens. A piece is a part of one window."""
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
class Contender:
    """A model, or a variant of one, that has read its windows. `name` is for messages. `before` counts the windows of earlier
    runs."""

    name: str
    reading: Reading
    variant: str = ""
    before: int = 0

    def add_scores(self, scores: TokenScores, start: int, pieces: Sequence[Piece], base: torch.Tensor | None) -> torch.Tensor:
        """Adds the scores of pieces of windows as tokens `start` onwards. Returns their logits. Raises NonFiniteError."""
        logits, ids = self.reading.logits(self.variant, pieces), torch.cat([piece.ids for piece in pieces])
        scores.add(start, logits, ids.to(logits.device), base)
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
    base: Contender | None, others: Sequence[Contender], windows: Sequence[Window]
) -> tuple[TokenScores | None, list[TokenScores]]:
    """The scores of every scored token, in the order of `windows`: those of the base, if there is one, and those of the others,
    compared with it.

    Raises NonFiniteError, which names token, window and block.
    """
    contenders = [*others, *([base] if base else [])]
    count = sum(window.scored for window in windows)
    of_base = TokenScores(count) if base else None
    scores = [TokenScores(count, compared=base is not None) for _ in others]
    readings = {id(contender.reading): contender.reading for contender in contenders}.values()
    for reading in readings:
        reading.skeleton.load(reading.head.unit)
    vocabulary = max(reading.head.unit.module.weight.shape[0] for reading in readings)
    rows = max(min(_LOGITS // vocabulary, _ROWS), 16)
    start = 0
    for pieces in pieces_of(windows, rows):
        logp = log_probabilities(base.add_scores(of_base, start, pieces, None)) if base else None
        for contender, own in zip(others, scores):
            contender.add_scores(own, start, pieces, logp)
        start += sum(len(piece.ids) for piece in pieces)
        for number in (piece.window for piece in pieces if piece.last):
            for reading in readings:
                unit = reading.head.unit
                reading.advance(weight_bytes(unit) // len(windows), f"{unit.name}, window {number + 1} of {len(windows)}")
    for reading in readings:
        reading.skeleton.unload(reading.head.unit)
    return of_base, scores


def score_all(
    runs: Sequence[Sequence[Window]], read: Callable[[Sequence[Window], int], tuple[Contender | None, Sequence[Contender]]]
) -> list[TokenScores]:
    """`score` of one run after another, with the results joined: the base first, where there is one. `read(windows, before)` runs
    the models and returns (base, others)."""
    parts, before = [], 0
    for windows in runs:
        base, others = read(windows, before)
        of_base, of_others = score(base, others, windows)
        parts.append([of_base, *of_others] if of_base else of_others)
        before += len(windows)
    return [TokenScores.joined(found) for found in zip(*parts)]
