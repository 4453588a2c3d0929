import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcli import codebooks
from qcli.ops.dequantize_4bit import dequantize_4bit
from qcli.ops.quantize_4bit import cases, quantize_4bit
from qcli.packing import unpack_4bit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]


def theirs(x, block_size, quant_type="nf4"):
    packed, state = bnb.quantize_4bit(x, blocksize=block_size, quant_type=quant_type, compress_statistics=False)
    return packed, state.absmax


def assert_equal_to_bitsandbytes(x, block_size):
    packed, absmax = quantize_4bit(x, block_size, "nf4")
    expected_packed, expected_absmax = theirs(x, block_size)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(absmax, expected_absmax)


def on_thresholds(quant_type, block_size, absmax):
    """Blocks of `absmax` times every threshold and its float32 neighbours, of both signs."""
    t = codebooks.THRESHOLDS[quant_type]
    t = np.concatenate([np.nextafter(t, np.float32(-2)), t, np.nextafter(t, np.float32(2))])
    values = torch.from_numpy(np.concatenate([t, -t])) * absmax
    rows = torch.nn.functional.pad(values, (0, -values.numel() % (block_size - 1))).view(-1, block_size - 1)
    return torch.cat((torch.full((rows.shape[0], 1), absmax), rows), 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_nf4_is_bit_equal_to_bitsandbytes(dtype, block_size):
    generator = torch.Generator().manual_seed(block_size)
    for count in (1, 2, 31, block_size - 1, block_size, 3 * block_size + 17, 20 * block_size):
        x = torch.randn(count, generator=generator)
        assert_equal_to_bitsandbytes(x.to(dtype), block_size)
        # Heavy tails, over many scales.
        scales = 2.0 ** torch.randint(-4, 3, (count,), generator=generator)
        tails = x.sign() * x.abs().clamp(min=0.1) ** 5 * scales
        assert_equal_to_bitsandbytes(tails.to(dtype), block_size)


@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("absmax", [1.0, 0.75, 3.3e-3, 1e-38, 1e38])
def test_nf4_is_bit_equal_on_and_beside_thresholds(block_size, absmax):
    x = on_thresholds("nf4", block_size, absmax)
    assert_equal_to_bitsandbytes(x, block_size)
    assert_equal_to_bitsandbytes(x.flatten()[: block_size // 2 - 1], block_size)


def test_nf4_on_a_threshold_takes_the_lower_code():
    x = torch.ones(64)
    x[:15] = torch.from_numpy(codebooks.THRESHOLDS["nf4"])
    codes = unpack_4bit(quantize_4bit(x, 64, "nf4")[0], 64)
    assert codes[:15].tolist() == list(range(15))


def test_nf4_at_every_bfloat16_value_of_one_block_scale():
    """All bfloat16 in [-1, 1]: as many values as a bfloat16 weight with absmax 1 can hold."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    values = values[values.abs() <= 1]
    rows = torch.nn.functional.pad(values, (0, -values.numel() % 63)).view(-1, 63)
    assert_equal_to_bitsandbytes(torch.nn.functional.pad(rows, (1, 0), value=1.0), 64)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=200),
    st.sampled_from([32, 64]),
    st.sampled_from(DTYPES),
)
def test_nf4_is_bit_equal_for_any_finite_values(values, block_size, dtype):
    x = torch.tensor(values).to(dtype)
    x = torch.where(x.isfinite(), x, 1.0)
    blocks = torch.nn.functional.pad(x.float(), (0, -x.numel() % block_size)).view(-1, block_size)
    small = blocks.abs().amax(1) < 1e-38  # where the rules differ
    x = torch.where(small.repeat_interleave(block_size)[: x.numel()], 1.0, x).to(dtype)
    assert_equal_to_bitsandbytes(x, block_size)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_of_whole_blocks_give_the_whole_result(quant_type, dtype):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(150_001, generator=generator).to(dtype)  # more than one internal piece, and a partial block
    packed, absmax = quantize_4bit(x, 64, quant_type)
    for blocks in (1, 5, 1024, 1500):
        step = 64 * blocks
        start = 0 if blocks > 5 else x.numel() // step * step - 20 * step  # many small chunks take long
        parts = [quantize_4bit(chunk, 64, quant_type) for chunk in x[start:].split(step)]
        assert torch.equal(torch.cat([p for p, _ in parts]), packed[start // 2 :])
        assert torch.equal(torch.cat([a for _, a in parts]), absmax[start // 64 :])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_shape_and_strides_do_not_matter(quant_type):
    x = torch.randn(6, 50, 7, generator=torch.Generator().manual_seed(4))
    flat = quantize_4bit(x.flatten(), 64, quant_type)
    turned = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for other in (x, turned):
        assert all(torch.equal(a, b) for a, b in zip(quantize_4bit(other, 64, quant_type), flat))
    assert flat[0].shape == (1050, 1) and flat[1].shape == (33,)


def fp4_code(v: np.float32) -> int:
    """The decision tree of the CUDA kernel, one value at a time."""
    sign = 0b1000 if v < 0 else 0
    v = abs(v)
    f = np.float32
    if v > f(0.29166667):
        if v > f(0.583333):
            return sign + (0b0011 if v > f(0.8333333) else 0b0010)
        return sign + (0b0101 if v > f(0.4166667) else 0b0100)
    if v > f(0.0859375):
        return sign + (0b0111 if v > f(0.20833333) else 0b0110)
    return sign + (0b0001 if v > f(0.00260417) else 0b0000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp4_follows_the_cuda_kernel(dtype):
    generator = torch.Generator().manual_seed(5)
    x = torch.cat((torch.randn(40, 64, generator=generator), on_thresholds("fp4", 64, 1.0))).to(dtype)
    x[0, :4] = torch.tensor([1e-30, -1e-30, 0.0, -0.0]).to(dtype)
    packed, absmax = quantize_4bit(x, 64, "fp4")
    rows = x.float().numpy()
    maxima = np.abs(rows).max(1)
    assert np.array_equal(absmax.numpy(), maxima)
    v = rows * (np.float32(1) / maxima)[:, None]
    assert unpack_4bit(packed, x.numel()).tolist() == [fp4_code(value) for value in v.flatten()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp4_differs_from_bitsandbytes_cpu_only_as_documented(dtype):
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(6)).to(dtype)
    packed, absmax = quantize_4bit(x, 64, "fp4")
    expected_packed, expected_absmax = theirs(x, 64, "fp4")
    assert torch.equal(absmax, expected_absmax)
    ours, cpu = (unpack_4bit(p, x.numel()).long() for p in (packed, expected_packed))
    table = torch.from_numpy(codebooks.FP4)
    differs = table[ours] != table[cpu]
    zeros = (ours != cpu) & ~differs
    assert set(ours[zeros].tolist()) <= {0, 8} and 0.001 < zeros.float().mean() < 0.01
    # The rest are within 4e-7 of a midpoint: a tie, or between it and the kernel's literal.
    v = x.float() * (1 / absmax).repeat_interleave(64)
    midpoints = (table[ours] + table[cpu]) / 2
    assert ((v - midpoints)[differs].abs() < 4e-7).all()
    assert differs.float().mean() < 2e-3


@pytest.mark.parametrize("quant_type, byte", [("nf4", 0x77), ("fp4", 0x00)])
@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("count", [64, 128, 30])
def test_zero_block(quant_type, byte, zero, count):
    packed, absmax = quantize_4bit(torch.full((count,), zero), 64, quant_type)
    assert (absmax == 0).all() and (packed == byte).all()
    if count >= 64:  # bitsandbytes stores 1e-38 for a partial block of zeros
        assert torch.equal(packed, theirs(torch.full((count,), zero), 64, quant_type)[0])


@pytest.mark.parametrize("quant_type, last", [("nf4", 0xF7), ("fp4", 0x30)])
def test_odd_count_is_followed_by_the_code_of_zero(quant_type, last):
    packed, _ = quantize_4bit(torch.ones(5), 64, quant_type)
    assert packed.shape == (3, 1) and packed[-1, 0] == last


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("absmax", [9e-39, 1e-40, 1e-44])
@pytest.mark.parametrize("count", [64, 20])
def test_tiny_blocks_keep_their_codes(quant_type, absmax, count):
    """Below 1e-38, codes are those of the quotient, and what they decode to is finite."""
    x = torch.linspace(-1, 1, count) * absmax
    packed, scale = quantize_4bit(x, 64, quant_type)
    decoded = dequantize_4bit(packed, scale, 64, quant_type, [count], torch.float32)
    assert decoded.isfinite().all() and scale[0] == x.abs().max()
    v = (x.double() / x.abs().max().double()).float()
    thresholds = torch.from_numpy(codebooks.THRESHOLDS[quant_type])
    order = torch.from_numpy(codebooks.ORDER[quant_type])
    assert torch.equal(unpack_4bit(packed, count), order[torch.bucketize(v, thresholds)])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("count", [192, 140])
def test_nonfinite_values_spoil_their_block_alone(quant_type, bad, count):
    x = torch.randn(count, generator=torch.Generator().manual_seed(7))
    expected = quantize_4bit(x, 64, quant_type)
    x[count - 1] = bad
    packed, absmax = quantize_4bit(x, 64, quant_type)
    assert torch.equal(packed[:64], expected[0][:64]) and torch.equal(absmax[:2], expected[1][:2])
    decoded = dequantize_4bit(packed, absmax, 64, quant_type, [count], torch.float32)
    assert decoded[:128].isfinite().all() and not decoded[128:].isfinite().any()


def test_cases_decode_to_finite_values_within_half_a_step():
    for name, arguments in cases():
        x, quant_type = arguments["x"], arguments["quant_type"]
        packed, absmax = quantize_4bit(**arguments)
        decoded = dequantize_4bit(packed, absmax, arguments["block_size"], quant_type, list(x.shape), torch.float32)
        gap = np.diff(np.sort(codebooks.CODEBOOKS[quant_type])).max() / 2
        bound = absmax.repeat_interleave(arguments["block_size"])[: x.numel()].view(x.shape) * (gap + 1e-6)
        assert ((decoded - x.float()).abs() <= bound).all(), name
