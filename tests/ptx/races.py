"""Finds accesses to shared memory without a barrier between them.

Threads run side by side here, so a missing barrier may not show in the result. It shows because two warps access the same bytes
between two barriers, and one of them writes. The lanes of a warp are assumed to run in step. It is allowed that several warps write
the value that is already there (they raise the same flag).
"""

import numpy as np

GRAIN = 2  # bytes per recorded unit
NOBODY, SEVERAL, ATOMIC = -1, -2, -3  # instead of a warp's number


class Races:
    """For every two bytes: the last warp that accessed them, and the interval between barriers. Arguments of all functions: `index`
    is the first byte of each access, `size` its bytes, `warps` and `intervals` are int [accesses]. Each returns bool [accesses]:
    whether the access is a race."""

    def __init__(self, nbytes: int):
        count = nbytes // GRAIN
        self.writer, self.reader = (np.full(count, NOBODY, np.int32) for _ in range(2))
        self.written, self.read = (np.full(count, -1, np.int32) for _ in range(2))

    def on_read(self, index: np.ndarray, size: int, warps: np.ndarray, intervals: np.ndarray) -> np.ndarray:
        """Records reads. It is a race to read what another warp wrote in this interval."""
        places, warps, now = self._places(index, size), warps[:, None], intervals[:, None]
        wrong = (self.written[places] == now) & (self.writer[places] != warps)
        others = (self.read[places] == now) & (self.reader[places] != warps)
        self.reader[places] = np.where(others, SEVERAL, warps)
        lost = (self.reader[places] != warps) & (self.reader[places] != SEVERAL)  # two warps in one instruction
        self.reader[places[lost]] = SEVERAL
        self.read[places] = now
        return wrong.any(1)

    def on_write(
        self, index: np.ndarray, size: int, warps: np.ndarray, intervals: np.ndarray, new: np.ndarray, *, atomic: bool = False
    ) -> np.ndarray:
        """Records writes. It is a race to write what another warp read in this interval, or wrote if the value is `new` (bool
        [accesses])."""
        places, warps, now = self._places(index, size), warps[:, None], intervals[:, None]
        writer = self.writer[places]
        again = (self.written[places] == now) & (writer != warps) & ~(atomic & (writer == ATOMIC))
        wrong = (self.read[places] == now) & (self.reader[places] != warps) | again & new[:, None]
        self.writer[places] = ATOMIC if atomic else np.where(again, SEVERAL, warps)
        self.written[places] = now
        return wrong.any(1)

    def _places(self, index: np.ndarray, size: int) -> np.ndarray:
        return index[:, None] // GRAIN + np.arange(max(size // GRAIN, 1))
