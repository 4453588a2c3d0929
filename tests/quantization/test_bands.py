"""Columns that come in any order and from several threads are written once, whole."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qcli.quantization import bands
from qcli.quantization.bands import Bands


@pytest.mark.parametrize("limit, runs", [(1 << 20, 1), (3 * 40 * 32, 3), (1, 8)])
def test_pieces_in_any_order_are_written_in_bands(monkeypatch, limit, runs):
    monkeypatch.setattr(bands, "BAND_BYTES", limit)
    whole = torch.randint(-(1 << 31), 1 << 31, (40, 60), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    written, found = [], bytearray(40 * 240)

    def write(offset, data, row):
        written.append(offset)
        for i in range(40):
            found[offset + i * 240 : offset + i * 240 + row] = data[i * row : (i + 1) * row]

    collected = Bands(240, 32, write)
    starts = list(range(0, 60, 8))  # of columns; the last piece has four
    random.Random(0).shuffle(starts)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda start: collected.add(start * 4, whole[:, start : start + 8].contiguous()), starts))
    assert len(written) == runs and bytes(found) == whole.numpy().tobytes()
    assert not collected._open
