"""pack_codes against words made of the bits of numpy, in each layout."""

import numpy as np
import pytest
import torch

from qcli.ops.pack_codes import cases, pack_codes

AWQ_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)  # as AutoAWQ has them


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Words int32 of rows of unsigned codes: numpy's own bits, low ones first."""
    each = np.unpackbits(codes.astype(np.uint8)[..., None], axis=-1, bitorder="little")[..., :bits].reshape(len(codes), -1)
    return np.packbits(np.pad(each, ((0, 0), (0, -each.shape[1] % 32))), axis=-1, bitorder="little").view(np.int32)


def planes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Words int32 of rows of unsigned codes in units of 64 columns, bit by bit as docs/formats.md says."""
    units = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 64))).reshape(len(codes), -1, 64)
    made = np.zeros((*units.shape[:2], 8 * bits), np.uint8)
    for column in range(64):
        code = units[..., column]
        if bits == 4:
            made[..., column % 32] |= (code << (column // 32 * 4)).astype(np.uint8)
            continue
        made[..., column % 16] |= ((code & 3) << (column // 16 * 2)).astype(np.uint8)
        if bits == 3:
            made[..., 16 + column // 8] |= ((code >> 2) << (column % 8)).astype(np.uint8)
    return made.reshape(len(codes), -1).view(np.int32)


def test_words_are_the_bits_of_the_codes():
    for case, arguments in cases():
        codes, bits, layout = arguments["codes"], arguments["bits"], arguments["layout"]
        if not codes.numel():
            continue
        unsigned = codes.numpy().astype(np.int64) + (1 << (bits - 1) if codes.dtype == torch.int8 else 0)
        if layout == "planes":
            expected = planes(unsigned, bits)
        elif layout == "awq":
            expected = stream(unsigned.T.reshape(-1, len(codes) // 8, 8)[..., AWQ_ROWS].reshape(-1, len(codes)), bits)
        else:
            expected = stream(unsigned, bits)
            expected = expected if layout == "rows" else expected.T
        assert np.array_equal(pack_codes(codes, bits, layout).numpy(), expected), case


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layout": "marlin"}, "layout is 'marlin', expected rows, columns, awq, planes"),
        ({"bits": 5}, "bits is 5, expected 2, 3, 4, 8"),
        ({"bits": 8, "layout": "awq"}, "bits is 8, expected 4"),
        ({"bits": 8, "layout": "planes"}, "bits is 8, expected 2, 3, 4"),
        ({"codes": torch.zeros(6, 8, dtype=torch.int8), "layout": "awq"}, "codes have 6 rows"),
        ({"codes": torch.zeros(8, 8)}, "codes are torch.float32 in 2 dimensions"),
        ({"codes": torch.zeros(8, dtype=torch.int8)}, "codes are torch.int8 in 1 dimensions"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        pack_codes(**({"codes": torch.zeros(8, 8, dtype=torch.int8), "bits": 4, "layout": "rows"} | change))
