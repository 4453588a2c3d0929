import pytest
import torch

from qcli.packing import pack_4bit, unpack_4bit


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
