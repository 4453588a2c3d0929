"""Windows of text put together into batches for the model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

BATCH_TOKENS = 2048  # in a batch at most, with padding, unless one window has more


@dataclass(frozen=True)
class Batch:
    """`ids` int64 [sequences, tokens]; `mask` bool of the same shape, False at padding; `windows`, the number of each row's
    window."""

    ids: torch.Tensor
    mask: torch.Tensor
    windows: tuple[int, ...]

    def counted(self, prefix: int) -> torch.Tensor:
        """`mask` without the first `prefix` tokens of each sequence."""
        counted = self.mask.clone()
        counted[:, :prefix] = False
        return counted

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Keyword arguments of the model."""
        ids = {"input_ids": self.ids.to(device)}
        return ids if bool(self.mask.all()) else ids | {"attention_mask": self.mask.to(device).long()}


def make_batches(windows: Sequence[Sequence[int]], padding: int | None, batch_tokens: int = BATCH_TOKENS) -> list[Batch]:
    """Batches of windows of similar length, longest first, padded at their ends with the id `padding`. Where it is None, a batch
    has windows of one length."""
    order = sorted(range(len(windows)), key=lambda i: (-len(windows[i]), i))
    batches = []
    while order:
        longest = len(windows[order[0]])
        rows = tuple(order[: max(batch_tokens // longest, 1)])
        if padding is None:
            rows = tuple(row for row in rows if len(windows[row]) == longest)
        order = order[len(rows) :]
        ids = torch.full((len(rows), longest), padding or 0, dtype=torch.long)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for row, window in enumerate(rows):
            tokens = windows[window]
            ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), True
        batches.append(Batch(ids, mask, rows))
    return batches
