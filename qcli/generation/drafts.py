"""Guesses of the next tokens, which one step of the model then checks all at once.

A step of a few tokens reads the weights once, as a step of one token does. Every token is still chosen from the model's own logits,
in order, and the first one that differs from its guess ends the step (Leviathan et al., 2023, with guesses that are certain: a
guess is kept exactly when the model chooses it). So greedy and sampled texts are those of the model alone.
"""

import warnings
from contextlib import suppress
from typing import Protocol

import torch

from qcli.errors import QcliWarning, UsageError
from qcli.generation.lean_step import MOST_TOKENS
from qcli.generation.step import Unsupported


class Draft(Protocol):
    """What guesses the tokens of one text after the other."""

    def prepare(self) -> None:
        """Does what takes time once, before the prompt of a text is read."""

    def begin(self, ids: list[int], length: int) -> bool:
        """A new text begins with `ids`; it grows to `length` tokens at most. Returns whether there will be guesses."""

    def guess(self, ids: list[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `ids`."""

    def hear(self, guessed: int, kept: int) -> None:
        """How many of the last guesses the model kept."""


class _Length:
    """How many tokens are worth guessing: more after guesses that were all kept, fewer after others."""

    def __init__(self):
        self.count = 4

    def hear(self, guessed: int, kept: int) -> None:
        if guessed:
            self.count = min(self.count + 2, MOST_TOKENS - 1) if kept == guessed else max(kept + 1, 2)


class PromptLookup(_Length):
    """Guesses that the text repeats itself: what followed the last three tokens where they stood before, or the last two.

    For summaries, code and answers that quote the prompt (Saxena, 2023).
    """

    NGRAMS = (3, 2)

    def prepare(self) -> None:
        """There is nothing to do."""

    def begin(self, ids: list[int], length: int) -> bool:
        self.count = 4
        self._known: dict[tuple[int, ...], int] = {}  # n-gram -> the position behind its latest occurrence
        self._read = 0
        return True

    def guess(self, ids: list[int], most: int) -> list[int]:
        for end in range(self._read + 1, len(ids)):  # the text's own end is not among them: nothing has followed it
            for n in self.NGRAMS:
                if end >= n:
                    self._known[tuple(ids[end - n : end])] = end
        self._read = len(ids) - 1
        for n in self.NGRAMS:
            place = self._known.get(tuple(ids[-n:])) if len(ids) >= n else None
            if place is not None:
                return ids[place : place + min(self.count, most)]
        return []


class DraftModel(_Length):
    """Guesses what a smaller model with the same vocabulary would choose. `lean` is its lean step, `end` its number of positions,
    if they have an end. It guesses nothing about a text that it cannot read."""

    def __init__(self, lean, end: int | None = None):
        super().__init__()
        self.lean, self.end = lean, end

    def prepare(self) -> None:
        """Makes the draft's own step. One that differs from its model is said when a text begins."""
        with suppress(Unsupported):
            self.lean.prepare()

    def begin(self, ids: list[int], length: int) -> bool:
        self.count = 4
        if self.end is not None and len(ids) >= self.end:
            return False
        if max(ids) >= self.lean.vocabulary:
            return False
        try:
            self.lean.prefill(torch.tensor([ids[:-1] or ids]), min(length, self.end or length))
        except Unsupported:
            warnings.warn("--draft is not used: the draft differs from what its lean step computes", QcliWarning, stacklevel=2)
            return False
        self._read = max(len(ids) - 1, 1)
        return True

    def guess(self, ids: list[int], most: int) -> list[int]:
        guessed: list[int] = []
        if self.end is not None:
            most = min(most, self.end - len(ids))
        if max(ids[self._read :], default=0) >= self.lean.vocabulary:
            return []
        self._read = min(self._read, len(ids) - 1)  # beyond it are guesses, some of which were not kept
        while len(guessed) < min(self.count, most):
            text = ids + guessed
            some = text[self._read : self._read + MOST_TOKENS]
            logits = self.lean.run(torch.tensor(some), self._read)
            self._read += len(some)
            if self._read == len(text):
                guessed.append(int(logits[-1].argmax()))
        return guessed


def same_vocabulary(model, draft) -> None:
    """Raises UsageError unless two tokenizers give the same ids the same tokens."""
    ours, theirs = model.get_vocab(), draft.get_vocab()
    different = len(ours.items() ^ theirs.items())
    if different:
        raise UsageError(
            f"--draft: the draft's vocabulary differs from the model's in {different:,} entries",
            "A draft must have the model's own tokenizer: take a smaller model of the same family.",
        )
