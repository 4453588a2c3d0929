"""Collects what is stored transposed, so that it is written in long runs.

A chunk is some rows of a weight, and so a few columns of the tensor that formats such as GPTQ's store: thousands of runs of some
bytes, each of which would be a write of its own. A band is as many columns as fit into BAND_BYTES. It is held in memory until its
chunks have come, in any order and from several threads. A weight of one band is written at once.
"""

import threading
from collections.abc import Callable

import torch

BAND_BYTES = 16 << 20


class Bands:
    """The columns of one tensor of `stride` bytes a row, in pieces of `width` bytes of each row, the last of which may be narrower.
    `write(offset, data, row)` writes rows of `row` bytes, the first at `offset` of the tensor, each `stride` bytes after the one
    before."""

    def __init__(self, stride: int, width: int, write: Callable[[int, memoryview, int], None]):
        self._stride, self._width, self._write = stride, width, write
        self._lock = threading.Lock()
        self._open: dict[int, tuple[torch.Tensor, int]] = {}  # start to the band, and the bytes of a row that it still lacks

    def add(self, offset: int, piece: torch.Tensor) -> None:
        """Takes columns [rows, ...] that begin `offset` bytes from the start of a row, a multiple of the width."""
        flat = piece.detach().cpu().contiguous().view(len(piece), -1).view(torch.uint8)
        rows, width = flat.shape
        whole = max(BAND_BYTES // (rows * self._width), 1) * self._width
        start = offset // whole * whole
        with self._lock:
            if start not in self._open:
                columns = min(whole, self._stride - start)
                self._open[start] = torch.empty(rows, columns, dtype=torch.uint8), columns
            band, _ = self._open[start]
        band[:, offset - start : offset - start + width] = flat
        with self._lock:
            band, lacking = self._open.pop(start)
            if lacking > width:
                self._open[start] = band, lacking - width
                return
        self._write(start, band.view(-1).numpy().data, band.shape[1])
