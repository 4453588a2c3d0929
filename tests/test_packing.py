import pytest
import torch

from qcli.packing import pack_4bit, pack_planes, plane_bytes, unpack_4bit, unpack_planes


def test_earlier_element_is_in_the_high_nibble():
    packed = pack_4bit(torch.tensor([1, 2, 15, 0, 7], dtype=torch.uint8), filler=9)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [[0x12], [0xF0], [0x79]]


@pytest.mark.parametrize("count", [0, 1, 2, 255, 256])
def test_unpack_gives_back_what_was_packed(count):
    codes = torch.arange(count).remainder(16).to(torch.uint8)
    packed = pack_4bit(codes, filler=0)
    assert packed.shape == ((count + 1) // 2, 1)
    assert torch.equal(unpack_4bit(packed, count), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rows, columns", [(1, 64), (3, 1), (5, 130), (0, 64), (4, 0)])
def test_planes_hold_each_column_where_the_layout_says(bits, rows, columns):
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(columns)).to(torch.uint8)
    packed = pack_planes(codes, bits)
    size = 8 * bits  # bytes of a unit
    assert packed.dtype == torch.uint8 and packed.shape == (rows, -(-columns // 64) * size) == (rows, plane_bytes(columns, bits))
    for row, found in zip(codes.tolist(), packed.tolist()):
        for column in range(len(found) // size * 64):
            unit, c = found[column // 64 * size :][:size], column % 64
            if bits == 4:
                code = unit[c % 32] >> (c // 32 * 4) & 15
            else:
                code = unit[c % 16] >> (c // 16 * 2) & 3
            if bits == 3:
                code |= (int.from_bytes(unit[16:], "little") >> c & 1) << 2
            assert code == (row[column] if column < columns else 0)
    assert torch.equal(unpack_planes(packed, bits, columns), codes)
