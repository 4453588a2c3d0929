"""The order in which rows are read, and the batches in which they pass the model.

An epoch's order follows from the seed and the epoch's number, so that a run can go on at any step. A step takes the next rows of
that order; the last step of an epoch takes what is left. The rows of a step pass the model a few at a time: one below the other and
padded, or, where the model keeps such rows apart, packed one behind the other. Both give the same sums. Padding costs products, and
packing costs attention between rows that is masked out again, so that the lengths of a step's rows decide.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from qcli.finetuning.encoding import Row


@dataclass(frozen=True)
class Order:
    """Of `rows` rows in steps of `batch`, from `seed`."""

    rows: int
    batch: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows // self.batch)

    def step(self, number: int) -> list[int]:
        """The rows that step `number` reads, counted from 0."""
        epoch, place = divmod(number, self.steps_per_epoch)
        return _permutation(self.rows, (self.seed << 20) + epoch)[place * self.batch : (place + 1) * self.batch].tolist()


@lru_cache(maxsize=1)
def _permutation(rows: int, seed: int) -> torch.Tensor:
    """Of an epoch, which all of its steps read."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Batch:
    """What passes the model at once: `ids` int64 [sequences, tokens], `trained` bool of the same shape, and either `positions`
    int64, which begin anew with each packed row, or `mask` bool, False at padding."""

    ids: torch.Tensor
    trained: torch.Tensor
    positions: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Keyword arguments of the model."""
        found = {"input_ids": self.ids.to(device)}
        if self.positions is not None:
            found["position_ids"] = self.positions.to(device)
        if self.mask is not None:
            found["attention_mask"] = self.mask.to(device).long()
        return found


def batches_of(rows: Sequence[Row], packs: bool, most_tokens: int, most_rows: int | None, width: int = 1024) -> list[Batch]:
    """Batches of at most `most_tokens` tokens, padding included, and of `most_rows` rows, or of one row. Longest rows come first.
    `packs` allows packing. `width` is the model's hidden size, by which attention is weighed against products."""
    most_rows = most_rows or len(rows)
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    padded = _groups(rows, order, most_rows, lambda group, row: (len(group) + 1) * len(group[0]) <= most_tokens)
    if packs:
        packed = _groups(rows, order, most_rows, lambda group, row: sum(map(len, group)) + len(row) <= most_tokens)
        if _cost([(1, sum(map(len, group))) for group in packed], width) < _cost([(len(g), len(g[0])) for g in padded], width):
            return [_packed(group) for group in packed]
    return [_padded(group) for group in padded]


def _groups(rows: Sequence[Row], order: Sequence[int], most_rows: int, fits: Callable[[list[Row], Row], bool]) -> list[list[Row]]:
    """Each row in the first group that it fits."""
    groups: list[list[Row]] = []
    for i in order:
        room = (group for group in groups if len(group) < most_rows and fits(group, rows[i]))
        if (group := next(room, None)) is None:
            groups.append([rows[i]])
        else:
            group.append(rows[i])
    return groups


def _cost(shapes: Iterable[tuple[int, int]], width: int) -> float:
    """Of batches of (sequences, tokens): a token takes about 12 width^2 products a layer, its attention to n tokens 2 n width."""
    return sum(sequences * tokens * (1 + tokens / (6 * width)) for sequences, tokens in shapes)


def _packed(rows: Sequence[Row]) -> Batch:
    ids, trained = (torch.cat([torch.from_numpy(each) for each in all_]) for all_ in zip(*((r.ids, r.trained) for r in rows)))
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    return Batch(ids.long().unsqueeze(0), trained.unsqueeze(0), positions.unsqueeze(0) if len(rows) > 1 else None)


def _padded(rows: Sequence[Row]) -> Batch:
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    trained, mask = torch.zeros(2, len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], trained[i, : len(row)] = torch.from_numpy(row.ids).long(), torch.from_numpy(row.trained)
        mask[i, : len(row)] = True
    return Batch(ids, trained, mask=None if bool(mask.all()) else mask)
