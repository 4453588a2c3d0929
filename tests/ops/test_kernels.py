"""Every variant of every kernel against the reference, over each op's cases and over shapes that hypothesis finds."""

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcli import ops
from qcli.ops.dequantize_4bit import dequantize_4bit
from qcli.ops.error_4bit import error_4bit
from qcli.ops.error_int8 import error_int8
from qcli.ops.fit_scale import fit_scale
from qcli.ops.linear_4bit import linear_4bit
from qcli.ops.linear_int8 import linear_int8
from qcli.ops.quantize_4bit import quantize_4bit
from qcli.ops.quantize_absmax import mean_absmax, quantize_absmax
from qcli.ops.quantize_int8 import quantize_int8
from qcli.runtime import cpu
from tests.parity import bits, flat, results

COMPILED = [name for name in ops.names() if hasattr(import_module(f"qcli.ops.{name}"), "_cpu")]
EXACT = [
    name
    for name in COMPILED
    if "quantize" in name or name in ("fit_scale", "fit_table", "gptq_columns", "pack_codes", "rope_append", "round_to_grid")
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def compiled(variant):
    if variant == cpu.REFERENCE:
        pytest.skip("compares kernels with the reference")


def same_bits(ours, theirs):
    return all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b)) for a, b in zip(ours, theirs))


def reference(function, *arguments):
    with cpu.using(None):
        return flat(function(*arguments))


def close_sums(sums, expected):
    """Differences are float32, each with the rounding of what it is a difference of; what is below 1e-19 of a block's
    absmax has no square."""
    error, norm = expected[:2].tolist()
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=2.0**-20 * (error * norm) ** 0.5 + 1e-14 * norm)


@pytest.mark.parametrize("name", EXACT)
def test_exact_ops_are_bit_equal(name):
    module = import_module(f"qcli.ops.{name}")
    for case, arguments in module.cases():
        assert same_bits(results(name, module._cpu, arguments), results(name, module._reference, arguments)), case


@pytest.mark.parametrize("name", COMPILED)
def test_threads_and_variants_do_not_matter(name, monkeypatch):
    """The same bits from one thread and from three; those of sums are also the same on every variant."""
    module = import_module(f"qcli.ops.{name}")
    for case, arguments in module.cases():
        one = results(name, module._cpu, arguments)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "get_num_threads", lambda: 3)
            assert same_bits(results(name, module._cpu, arguments), one), case
        if not name.startswith("linear"):
            with cpu.using("generic"):
                assert same_bits(results(name, module._cpu, arguments), one), case


def test_large_tensors_take_several_threads_to_the_same_bits(monkeypatch):
    x = torch.randn(700, 1031, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight, scale, _ = quantize_int8(torch.randn(300, 1031, generator=torch.Generator().manual_seed(1)), 0.0)

    def run():
        packed, absmax = quantize_4bit(x, 64, "nf4")
        q, rows, outliers = quantize_int8(x, 3.0)
        few = [linear_4bit(x[:n], packed, absmax, None, 0.0, None, 64, "nf4", 700, torch.float32) for n in (1, 12)]
        several = [linear_int8(x[:n], weight, scale, None, 3.0) for n in (3, 20)]
        decoded = dequantize_4bit(packed, absmax, 64, "nf4", [700, 1031], torch.float16)
        return packed, absmax, q, rows, outliers, decoded, *error_4bit(x, packed, absmax, 64, "nf4"), *few, *several

    one = run()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert same_bits(run(), one)
    library = cpu.library()
    try:
        library.qcli_use_openmp(None)  # threads of its own
        assert same_bits(run(), one)
    finally:
        library.qcli_use_openmp(cpu._torch_openmp())


SPECIAL = [0.0, -0.0, 1e-45, -1e-39, 9e-39, 3e38, -3e38, torch.inf, -torch.inf, torch.nan, 1.0, -1.0, 6.0, 65504.0]


@st.composite
def matrices(draw):
    """A matrix of any float dtype, with a few special values."""
    rows, columns = draw(st.integers(0, 9)), draw(st.integers(1, 400))
    seed, scale = draw(st.integers(0, 2**31)), draw(st.sampled_from([1.0, 1e-3, 1e4, 1e-40]))
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    for place, value in draw(st.lists(st.tuples(st.integers(0, 2**31), st.sampled_from(SPECIAL)), max_size=4)):
        if x.numel():
            x.view(-1)[place % x.numel()] = value
    return x.to(draw(st.sampled_from(DTYPES)))


BLOCK_SIZES = st.sampled_from([2, 6, 30, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(matrices(), BLOCK_SIZES, st.sampled_from(["nf4", "fp4"]), st.sampled_from(DTYPES))
def test_4bit_is_bit_equal_for_any_matrix(x, block_size, quant_type, dtype):
    options = (block_size, quant_type)
    packed, absmax = quantize_4bit(x, *options)
    assert same_bits((packed, absmax), reference(quantize_4bit, x, *options))
    arguments = (packed, absmax, *options, list(x.shape), dtype)
    decoded = dequantize_4bit(*arguments)
    (expected,) = reference(dequantize_4bit, *arguments)
    assert same_bits([decoded.isnan()], [expected.isnan()])
    assert same_bits([decoded.nan_to_num(nan=0)], [expected.nan_to_num(nan=0)])
    offset = mean_absmax(absmax)
    assert offset == reference(mean_absmax, absmax)[0] or offset != offset
    assert same_bits(quantize_absmax(absmax, offset), reference(quantize_absmax, absmax, offset))
    sums, *per_block = error_4bit(x, packed, absmax, *options)
    expected, *expected_blocks = reference(error_4bit, x, packed, absmax, *options)
    close_sums(sums, expected)
    # A slope is a sum of both signs: its rounding is relative to its terms.
    size = absmax.double().nan_to_num(0, 0, 0) * block_size * 2.0**-7
    assert ((per_block[0].double() - expected_blocks[0].double()).abs() <= size).all()
    torch.testing.assert_close(per_block[1], expected_blocks[1], rtol=2.0**-7, atol=0)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(matrices(), st.sampled_from([0.0, 6.0, 0.5]))
def test_int8_is_bit_equal_for_any_matrix(x, threshold):
    assert same_bits(quantize_int8(x, threshold), reference(quantize_int8, x, threshold))
    q, absmax, _ = quantize_int8(x, 0.0)
    close_sums(error_int8(x, q, absmax), reference(error_int8, x, q, absmax)[0])


FORMS = st.sampled_from([("", 2, False), ("", 3, True), ("", 4, False), ("", 8, True), ("nf4", 4, False), ("fp4", 4, False)])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(matrices(), st.sampled_from([1, 7, 32, 50, 128, 400, 4096]), FORMS, st.sampled_from(DTYPES))
def test_scales_are_bit_equal_for_any_matrix(x, size, form, dtype):
    assert same_bits(fit_scale(x, size, *form, dtype), reference(fit_scale, x, size, *form, dtype))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(1, 600),
    st.integers(1, 40),
    st.integers(0, 20),
    BLOCK_SIZES,
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
def test_linear_ops_agree_for_any_shape(columns, out_features, tokens, block_size, nested, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    columns = columns // 128 * 128 or columns  # mostly whole chunks, which have kernels of their own
    weight = torch.randn(out_features, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    packed, absmax = quantize_4bit(weight, block_size, "nf4")
    nested_absmax, offset = None, 0.0
    if nested:
        offset = mean_absmax(absmax)
        absmax, nested_absmax = quantize_absmax(absmax, offset)
    stored = (packed, absmax, nested_absmax, offset, None, block_size, "nf4", out_features)
    (expected,) = reference(linear_4bit, x.float(), *stored, torch.float32)
    # Of x and the weight to the compute dtype, of float32 sums, and of the result.
    rounding = {torch.float32: 2.0**-19, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    bound = rounding * (x.float().abs() @ weight.abs().t() + expected.abs()) + 1e-6
    assert ((linear_4bit(x, *stored, dtype).float() - expected).abs() <= bound).all()
    x[:, 0] = 9
    q, scale, _ = quantize_int8(weight, 0.0)
    arguments = (x, q, scale, None, 6.0)
    (expected,) = reference(linear_int8, *arguments)
    assert ((linear_int8(*arguments).float() - expected.float()).abs() <= bound + rounding * expected.abs()).all()
