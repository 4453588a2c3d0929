import bitsandbytes.functional as bnb
import pytest
import torch

from qcli import codebooks
from qcli.ops.dequantize_4bit import dequantize_4bit
from qcli.ops.quantize_4bit import quantize_4bit
from qcli.packing import pack_4bit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("shape", [(1,), (63,), (64, 256), (33, 70), (3, 5, 64), (17, 4097)])
def test_bit_equal_to_bitsandbytes(quant_type, dtype, block_size, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed, absmax = quantize_4bit(x, block_size, quant_type)
    # Flat: its AVX-512 kernel misplaces absmax where a block straddles rows whose length is a multiple of 16.
    state = bnb.QuantState(absmax, torch.Size((x.numel(),)), None, block_size, quant_type, dtype)
    ours = dequantize_4bit(packed, absmax, block_size, quant_type, list(shape), dtype)
    assert ours.dtype == dtype and ours.shape == shape
    assert torch.equal(ours, bnb.dequantize_4bit(packed, state).view(shape))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_is_rounded_once(quant_type, dtype):
    """code * absmax in float32, then one rounding: products that a 16-bit product would round differently."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(4)
    absmax = torch.tensor([0.0123456789, 3.0000002])
    packed = pack_4bit(torch.cat((codes, codes)), 0)
    found = dequantize_4bit(packed, absmax, 64, quant_type, [2, 64], dtype)
    exact = torch.from_numpy(codebooks.CODEBOOKS[quant_type])[codes.long()].double() * absmax.double().unsqueeze(1)
    assert torch.equal(found, exact.float().to(dtype))


def test_odd_count_leaves_the_filler_out():
    packed, absmax = quantize_4bit(torch.tensor([1.0, -1.0, 1.0]), 64, "nf4")
    assert dequantize_4bit(packed, absmax, 64, "nf4", [3], torch.float32).tolist() == [1.0, -1.0, 1.0]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_pieces_do_not_show(quant_type):
    """A tensor larger than one internal piece decodes as its halves do."""
    x = torch.randn(150_001, generator=torch.Generator().manual_seed(2))
    packed, absmax = quantize_4bit(x, 64, quant_type)
    whole = dequantize_4bit(packed, absmax, 64, quant_type, [x.numel()], torch.bfloat16)
    cut = 64 * 999
    first = dequantize_4bit(packed[: cut // 2], absmax[: cut // 64], 64, quant_type, [cut], torch.bfloat16)
    rest = dequantize_4bit(packed[cut // 2 :], absmax[cut // 64 :], 64, quant_type, [x.numel() - cut], torch.bfloat16)
    assert torch.equal(whole, torch.cat((first, rest)))
