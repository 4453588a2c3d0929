"""What is kept of each scored token: its loss, and the divergence of its distribution from another model's.

Logits come in chunks, in any order, and are not kept. A token keeps 8 to 17 bytes, in its own place. So statistics are the same to
the bit however the logits were cut. Softmax and sums over the vocabulary are in float64.
"""

from collections.abc import Sequence

import numpy as np
import torch

_PIECE = 1 << 17  # logits at a time: in float64 they take 1 MiB, which fits in a core's cache


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Logits [tokens, vocabulary] of any float dtype to the logarithms of their softmax, float64."""
    return torch.log_softmax(logits.double(), 1)


class TokenScores:
    """`count` tokens: `loss` [tokens] in nats, float64, NaN until it is added. A model that is `compared` with a base also has
    `divergence`, KL(base || model) in nats, float64, and `agrees`, whether both have the same likeliest token (the first of equal
    ones)."""

    def __init__(self, count: int, *, compared: bool = False):
        self.loss = np.full(count, np.nan)
        self.divergence = np.full(count, np.nan) if compared else None
        self.agrees = np.zeros(count, dtype=bool) if compared else None

    @classmethod
    def joined(cls, parts: Sequence["TokenScores"]) -> "TokenScores":
        """The tokens of all parts, one after another."""
        whole = cls(0)
        whole.loss = np.concatenate([part.loss for part in parts])
        if parts[0].divergence is not None:
            whole.divergence = np.concatenate([part.divergence for part in parts])
            whole.agrees = np.concatenate([part.agrees for part in parts])
        return whole

    @classmethod
    def placed(cls, parts: Sequence[tuple[Sequence[int], "TokenScores"]], counts: Sequence[int]) -> "TokenScores":
        """The tokens of parts of a text in its order. A part is (the numbers of its windows, ascending; their scores), and `counts`
        are the scored tokens of all windows."""
        ends = np.cumsum([0, *counts])
        whole = cls(int(ends[-1]), compared=parts[0][1].divergence is not None)
        for numbers, part in parts:
            places = np.concatenate([np.arange(ends[i], ends[i + 1]) for i in numbers])
            whole.loss[places] = part.loss
            if whole.divergence is not None:
                whole.divergence[places], whole.agrees[places] = part.divergence, part.agrees
        return whole

    def add(self, first: int, logits: torch.Tensor, targets: torch.Tensor, base: torch.Tensor | None = None) -> None:
        """Adds the tokens from number `first` on: the logits [tokens, vocabulary] that predicted them, the ids [tokens] that came,
        and the base's log_probabilities [tokens, vocabulary]."""
        rows = max(1, _PIECE // logits.shape[1])
        for start in range(0, len(logits), rows):
            piece = slice(start, start + rows)
            found = log_probabilities(logits[piece])
            place = slice(first + start, first + start + len(found))
            self.loss[place] = -found.gather(1, targets[piece].unsqueeze(1)).squeeze(1).cpu().numpy()
            if base is not None:
                self.divergence[place] = divergence(base[piece], found).cpu().numpy()
                self.agrees[place] = (base[piece].argmax(1) == found.argmax(1)).cpu().numpy()


def divergence(base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(base || other) [tokens] in nats, of log probabilities [tokens, vocabulary]. Tokens that the base rules out add nothing."""
    terms = base.exp() * (base - other)
    return terms.masked_fill_(base == -torch.inf, 0.0).sum(1).clamp_(min=0.0)
