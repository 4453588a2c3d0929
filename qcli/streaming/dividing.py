"""The windows of a text, divided over machines that read it at the same time."""

from collections.abc import Sequence

from qcli.streaming.batches import make_batches
from qcli.streaming.corpus import Window


def divided(windows: Sequence[Window], powers: Sequence[int], *, padded: bool = True) -> list[list[int]]:
    """The numbers of the windows, ascending, for each machine, in proportion to the machines' `powers`. A machine may get none.

    Windows that one machine would read in one call stay together, so that each token's figures are what they are there. `padded`
    is that of qcli.streaming.reading.Reading.
    """
    loads, parts = [0.0] * len(powers), [list[int]() for _ in powers]
    for batch in make_batches([window.ids for window in windows], 0 if padded else None):
        size = sum(len(windows[row].ids) for row in batch.windows)
        i = min(range(len(powers)), key=lambda i: (loads[i] + size) / powers[i])
        loads[i] += size
        parts[i] += batch.windows
    return [sorted(part) for part in parts]
