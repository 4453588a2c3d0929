import bitsandbytes.functional as bnb
import pytest
import torch

from qcli import codebooks
from qcli.ops.dequantize_absmax import dequantize_absmax
from qcli.ops.quantize_absmax import cases


@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
def test_bit_equal_to_bitsandbytes(count):
    generator = torch.Generator().manual_seed(count)
    codes = torch.randint(0, 256, (count,), generator=generator).to(torch.uint8)
    nested_absmax = torch.rand((count + 255) // 256, generator=generator)
    offset = torch.rand((), generator=generator)
    state = bnb.QuantState(nested_absmax, code=bnb.create_dynamic_map(), blocksize=256, dtype=torch.float32)
    expected = bnb.dequantize_blockwise(codes, state) + offset
    assert torch.equal(dequantize_absmax(codes, nested_absmax, offset.item()), expected)


def test_is_the_nested_path_of_bitsandbytes():
    """Their double quantization of a weight, undone by us, is their own absmax."""
    weight = torch.randn(300, 128, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    absmax = dequantize_absmax(state.absmax, state.state2.absmax, state.offset.item())
    expected = bnb.dequantize_4bit(packed, state)
    state.nested, state.absmax = False, absmax
    assert torch.equal(bnb.dequantize_4bit(packed, state), expected)


def test_every_code():
    codes = torch.arange(256).to(torch.uint8)
    decoded = dequantize_absmax(codes, torch.tensor([0.5]), 0.0)
    assert torch.equal(decoded, torch.from_numpy(codebooks.DYNAMIC_MAP) * 0.5)


def test_cases_come_back_within_the_widest_gap():
    from qcli.ops.quantize_absmax import quantize_absmax

    for name, arguments in cases():
        codes, nested_absmax = quantize_absmax(**arguments)
        decoded = dequantize_absmax(codes, nested_absmax, arguments["offset"])
        bound = nested_absmax.repeat_interleave(256)[: codes.numel()] * 0.0081 + 1e-7  # -0.993 stands for -1
        assert ((decoded - arguments["absmax"]).abs() <= bound).all(), name
