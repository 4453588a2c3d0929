import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from qcli import codebooks
from qcli.ops import linear_4bit as module
from qcli.ops.dequantize_4bit import dequantize_4bit
from qcli.ops.dequantize_absmax import dequantize_absmax
from qcli.ops.linear_4bit import cases, linear_4bit
from qcli.ops.quantize_4bit import quantize_4bit
from qcli.ops.quantize_absmax import mean_absmax, quantize_absmax
from qcli.packing import unpack_4bit
from qcli.runtime import cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def theirs(x, packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype):
    """bitsandbytes' forward: dequantize to the compute dtype, then linear in it."""
    flat = torch.Size((out_features * x.shape[-1],))  # in two dimensions its AVX-512 kernel needs whole blocks a row
    state = bnb.QuantState(absmax, flat, None, block_size, quant_type, compute_dtype)
    if nested_absmax is not None:
        state.nested, state.offset = True, torch.tensor(offset)
        state.state2 = bnb.QuantState(nested_absmax, None, bnb.create_dynamic_map(), 256, None, torch.float32)
    weight = bnb.dequantize_4bit(packed, state).view(out_features, -1)
    bias = None if bias is None else bias.to(compute_dtype)
    return torch.nn.functional.linear(x.to(compute_dtype), weight, bias).to(x.dtype)


VALUES = {"nf4": codebooks.NF4, "fp4": codebooks.FP4, "e2m1": codebooks.E2M1, "int4": np.arange(-8, 8, dtype=np.float32)}


def check(x, packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype, zero_point=None):
    """The reference is bit-equal to bitsandbytes. A kernel is within rounding of the product in float64: of x and the
    weight to the compute dtype, of float32 sums, and of the result to its dtype."""
    arguments = (x, packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype)
    y = linear_4bit(*arguments, zero_point)
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], out_features)
    if cpu.variant() is None and quant_type in ("nf4", "fp4") and block_size & (block_size - 1) == 0:  # it knows powers of two
        assert torch.equal(y, theirs(*arguments))
        return
    if absmax.dtype == torch.float8_e4m3fn:
        absmax = absmax.double() / nested_absmax
    elif nested_absmax is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, offset)
    count = out_features * x.shape[-1]
    code = torch.from_numpy(VALUES[quant_type]).double()[unpack_4bit(packed, count).int()]
    zero = torch.zeros(len(absmax)) if zero_point is None else zero_point
    scales = absmax.double().repeat_interleave(block_size)[:count].view(out_features, -1)
    zero = zero.double().repeat_interleave(block_size)[:count].view(out_features, -1)
    weight = (code.view(out_features, -1) - zero) * scales
    # A zero point takes its share of sums apart from that of the codes.
    terms = (code.view(out_features, -1).abs() + zero.abs()) * scales.abs()
    expected, magnitude = x.double() @ weight.t(), x.double().abs() @ terms.t()
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    rounding = 2.0**-20 + (2 * HALF_ULP[compute_dtype] if compute_dtype != torch.float32 else 0)
    bound = expected.abs() * HALF_ULP[y.dtype] + magnitude * rounding
    assert y.isfinite().all() and ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("name, arguments", [pytest.param(n, a, id=n) for n, a in cases()])
def test_cases(name, arguments):
    check(**arguments)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("compute_dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_any_compute_dtype(x_dtype, compute_dtype, quant_type):
    generator = torch.Generator().manual_seed(0)
    packed, absmax = quantize_4bit(torch.randn(24, 96, generator=generator), 64, quant_type)
    x = torch.randn(2, 3, 96, generator=generator).to(x_dtype)
    bias = torch.randn(24, generator=generator).to(x_dtype)
    check(x, packed, absmax, None, 0.0, bias, 64, quant_type, 24, compute_dtype)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096, 96])
@pytest.mark.parametrize("in_features", [256, 384, 352, 97])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 11, 40])
def test_any_shape_and_block_size(tokens, in_features, block_size, nested):
    """Rows that chunks of 128 and blocks do and do not divide, one token to panels of them."""
    generator = torch.Generator().manual_seed(block_size)
    packed, absmax = quantize_4bit(torch.randn(37, in_features, generator=generator), block_size, "nf4")
    nested_absmax, offset = None, 0.0
    if nested:
        offset = mean_absmax(absmax)
        absmax, nested_absmax = quantize_absmax(absmax, offset)
    x = torch.randn(tokens, in_features, generator=generator)
    bias = torch.randn(37, generator=generator)
    check(x, packed, absmax, nested_absmax, offset, bias, block_size, "nf4", 37, torch.float32)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 16])
def test_16_bit_compute_dtypes(tokens, dtype, quant_type):
    """Where kernels multiply 16-bit integers: magnitudes of x far apart, within a chunk of it and between them."""
    generator = torch.Generator().manual_seed(tokens)
    for in_features in (128, 256, 384):
        for block_size in (32, 64, 96, 128, 256, 512, 4096):
            weight = torch.randn(21, in_features, generator=generator)
            packed, absmax = quantize_4bit(weight, block_size, quant_type)
            x = torch.randn(tokens, in_features, generator=generator)
            x[:, 5] *= 60
            x[:, :100] *= 2.0**-12
            x[0, 100:] = 0
            bias = torch.randn(21, generator=generator).to(dtype)
            check(x.to(dtype), packed, absmax, None, 0.0, bias, block_size, quant_type, 21, dtype)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e36, 1e-40])
def test_values_that_have_no_step_in_16_bits(value):
    generator = torch.Generator().manual_seed(4)
    packed, absmax = quantize_4bit(torch.randn(16, 256, generator=generator) * 1e-3, 64, "nf4")
    x = torch.randn(3, 256, generator=generator).bfloat16()
    x[1] = value
    arguments = (packed, absmax, None, 0.0, None, 64, "nf4", 16, torch.bfloat16)
    y = linear_4bit(x, *arguments)
    with cpu.using(None):
        expected = linear_4bit(x.float(), *arguments[:-1], torch.float32).double()
        weight = dequantize_4bit(packed, absmax, 64, "nf4", [16, 256], torch.float32).double()
    assert torch.equal(y[[0, 2]].isfinite(), expected[[0, 2]].isfinite())
    assert torch.equal(y[1].isfinite(), expected.bfloat16()[1].isfinite())
    bound = 3 * HALF_ULP[torch.bfloat16] * (x.double().abs() @ weight.abs().t()) + 1e-40
    finite = y.isfinite()
    assert ((y.double() - expected).abs() <= bound)[finite].all()


@pytest.mark.parametrize("outlier", [20, 60, 100, 2e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_outlier_does_not_coarsen_its_neighbours(outlier, dtype):
    """Where its own weights are zero, nothing of the outlier covers the rounding of the rest: root mean square, against the
    rounding of the weight to the dtype."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(256, 512, generator=generator)
    weight[:, 7] = 0
    packed, absmax = quantize_4bit(weight, 64, "nf4")
    weight = dequantize_4bit(packed, absmax, 64, "nf4", [256, 512], torch.float32).double()
    x = torch.randn(1, 512, generator=generator)
    x[:, 7] = min(outlier, 6e4)
    x = x.to(dtype)
    y = linear_4bit(x, packed, absmax, None, 0.0, None, 64, "nf4", 256, dtype).double()
    exact, rounded = x.double() @ weight.t(), x.double() @ weight.to(dtype).double().t()
    error, of_result = (rounded - exact).square().mean(), (exact.to(dtype).double() - exact).square().mean()
    assert (y - exact).square().mean() <= 2 * (error + of_result)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("in_features", [160, 352, 576, 1568])
def test_rows_that_end_within_a_chunk(in_features, block_size, nested):
    """In bfloat16, where a kernel multiplies 16-bit integers, and with outliers in the whole chunks and in the partial one."""
    generator = torch.Generator().manual_seed(in_features)
    packed, absmax = quantize_4bit(torch.randn(21, in_features, generator=generator), block_size, "nf4")
    nested_absmax, offset = None, 0.0
    if nested:
        offset = mean_absmax(absmax)
        absmax, nested_absmax = quantize_absmax(absmax, offset)
    for tokens in (1, 3, 6, 16):
        x = torch.randn(tokens, in_features, generator=generator)
        x[0, [3, in_features - 1]] = 2000.0
        x[-1, 70] = -3e4
        arguments = (packed, absmax, nested_absmax, offset, None, block_size, "nf4", 21, torch.bfloat16)
        check(x.bfloat16(), *arguments)
        if cpu.variant() is not None:  # plain torch also rounds the result to bfloat16, and then it is float32 again
            check(x, *arguments)


@pytest.mark.parametrize("every", [1, 2, 7, 40])
def test_any_number_of_outliers(every):
    """None, some, and more than are taken out one by one: against a background that is some 10,000 times smaller."""
    generator = torch.Generator().manual_seed(every)
    packed, absmax = quantize_4bit(torch.randn(40, 576, generator=generator), 64, "nf4")
    x = torch.randn(5, 576, generator=generator)
    x[:, ::every] *= 1e4
    x[2] = 0
    x[2, 575] = 1.0
    check(x.bfloat16(), packed, absmax, None, 0.0, None, 64, "nf4", 40, torch.bfloat16)


def test_many_panels(monkeypatch):
    monkeypatch.setattr(module, "_PANEL_BYTES", 10_000)
    generator = torch.Generator().manual_seed(1)
    for in_features in (192, 191):  # a row of 191 may begin within a byte
        packed, absmax = quantize_4bit(torch.randn(60, in_features, generator=generator), 64, "nf4")
        x = torch.randn(20, in_features, generator=generator)
        check(x, packed, absmax, None, 0.0, x[0, :60].clone(), 64, "nf4", 60, torch.float32)


def test_strides_do_not_matter():
    generator = torch.Generator().manual_seed(2)
    packed, absmax = quantize_4bit(torch.randn(16, 128, generator=generator), 64, "nf4")
    x = torch.randn(128, 3, generator=generator).t()
    arguments = (packed, absmax, None, 0.0, None, 64, "nf4", 16, torch.float32)
    torch.testing.assert_close(linear_4bit(x, *arguments), linear_4bit(x.contiguous(), *arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 40])
def test_non_finite_input_and_weight_spoil_what_they_touch(rows):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(16, 128, generator=generator)
    weight[5, 3] = torch.nan
    packed, absmax = quantize_4bit(weight, 64, "nf4")
    x = torch.randn(rows + 1, 128, generator=generator)
    x[rows, 7] = torch.inf
    y = linear_4bit(x, packed, absmax, None, 0.0, None, 64, "nf4", 16, torch.float32)
    assert not y[rows].isfinite().any() and y[:rows, 5].isnan().all()
    assert y[:rows, [i for i in range(16) if i != 5]].isfinite().all()


def test_no_rows():
    packed, absmax = quantize_4bit(torch.ones(8, 64), 64, "nf4")
    x = torch.empty(2, 0, 64)
    assert linear_4bit(x, packed, absmax, None, 0.0, None, 64, "nf4", 8, torch.float32).shape == (2, 0, 8)


def test_a_known_product():
    """Weights that NF4 holds exactly: 1 and -1 and 0."""
    weight = torch.eye(4, 64) - torch.eye(4, 64).roll(1, 1)
    packed, absmax = quantize_4bit(weight, 64, "nf4")
    x = torch.arange(64.0).unsqueeze(0) ** 2
    y = linear_4bit(x, packed, absmax, None, 0.0, torch.ones(4), 64, "nf4", 4, torch.float32)
    assert y.tolist() == [[0.0, -2.0, -4.0, -6.0]]


def test_tensors_of_the_wrong_size_are_refused():
    if cpu.variant() is None:
        pytest.skip("torch refuses them in its own words")
    packed, absmax = quantize_4bit(torch.ones(8, 64), 64, "nf4")
    x = torch.ones(1, 64)
    with pytest.raises(ValueError, match="packed has 128 elements of torch.uint8, expected 256"):
        linear_4bit(x, packed[:128], absmax, None, 0.0, None, 64, "nf4", 8, torch.float32)
    with pytest.raises(ValueError, match="absmax has 7 elements of torch.float32, expected 8"):
        linear_4bit(x, packed, absmax[:7], None, 0.0, None, 64, "nf4", 8, torch.float32)
    with pytest.raises(ValueError, match="bias has 1 elements"):
        linear_4bit(x, packed, absmax, None, 0.0, torch.ones(1), 64, "nf4", 8, torch.float32)
    with pytest.raises(TypeError, match="x is torch.float64"):
        linear_4bit(x.double(), packed, absmax, None, 0.0, None, 64, "nf4", 8, torch.float32)


@pytest.mark.parametrize("columns, block_size", [(2048, 64), (1536, 128), (480, 32), (2080, 64), (1088, 256)])
def test_blocks_of_many_tokens(columns, block_size, monkeypatch):
    """More tokens than a block of them, rows that are no multiple of four, outliers; within bfloat16's rounding of each product."""
    monkeypatch.setattr(module, "_most_tokens", lambda compute_dtype, plain: 256)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, columns, generator=generator)
    x = torch.randn(197, columns, generator=generator).bfloat16()
    x[3, 5], x[150, columns - 1] = 3000, -2000
    packed, absmax = quantize_4bit(weight, block_size, "nf4")
    offset = mean_absmax(absmax)
    absmax, nested = quantize_absmax(absmax, offset)
    bias = torch.randn(70, generator=generator)
    y = linear_4bit(x, packed, absmax, nested, offset, bias, block_size, "nf4", 70, torch.bfloat16)
    scales = dequantize_absmax(absmax, nested, offset)
    decoded = dequantize_4bit(packed, scales, block_size, "nf4", [70, columns], torch.float32).double()
    expected = x.double() @ decoded.t() + bias.double()
    bound = 2.0**-8 * (x.double().square() @ decoded.t().square()).sqrt() * 3 + 2.0**-8 * expected.abs()
    assert ((y.double() - expected).abs() <= bound).all()
