"""Accesses to shared memory that no barrier keeps apart.

Threads run side by side here, so a missing barrier need not show in the result. What shows is that two warps touched the same
bytes between two barriers, and one of them wrote. Lanes of a warp are taken to be in step, and where several warps write what
is there already (they raise the same flag) that is let pass.
"""

import numpy as np

GRAIN = 2  # bytes that are told apart
NOBODY, SEVERAL, ATOMIC = -1, -2, -3  # in the place of a warp's number


class Races:
    """Who touched each two bytes last, and in which interval between barriers. Arguments of all functions: `index` the first
    byte of each access, `size` its bytes, `warps` and `intervals` int [accesses]. Each returns bool [accesses]: who meets one."""

    def __init__(self, nbytes: int):
        count = nbytes // GRAIN
        self.writer, self.reader = (np.full(count, NOBODY, np.int32) for _ in range(2))
        self.written, self.read = (np.full(count, -1, np.int32) for _ in range(2))

    def on_read(self, index: np.ndarray, size: int, warps: np.ndarray, intervals: np.ndarray) -> np.ndarray:
        """Of what another warp wrote in this interval."""
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
        """To what another warp read in this interval, or wrote, where the value is `new` (bool [accesses])."""
        places, warps, now = self._places(index, size), warps[:, None], intervals[:, None]
        writer = self.writer[places]
        again = (self.written[places] == now) & (writer != warps) & ~(atomic & (writer == ATOMIC))
        wrong = (self.read[places] == now) & (self.reader[places] != warps) | again & new[:, None]
        self.writer[places] = ATOMIC if atomic else np.where(again, SEVERAL, warps)
        self.written[places] = now
        return wrong.any(1)

    def _places(self, index: np.ndarray, size: int) -> np.ndarray:
        return index[:, None] // GRAIN + np.arange(max(size // GRAIN, 1))
