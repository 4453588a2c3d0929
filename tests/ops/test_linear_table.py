import pytest
import torch

from qcli.ops import linear_table as module
from qcli.ops.dequantize_table import made
from qcli.ops.linear_table import cases, linear_table
from qcli.packing import pack_planes
from qcli.runtime import cpu
from tests.ops.test_dequantize_table import values_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def check(x, packed, table, absmax, zero_point, bias, bits, block_size, out_features, compute_dtype):
    """Within rounding of the product in float64: of x and the weight to the compute dtype, of float32 sums, and of the result."""
    y = linear_table(x, packed, table, absmax, zero_point, bias, bits, block_size, out_features, compute_dtype)
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], out_features)
    weight = values_of(packed, table, absmax, zero_point, bits, block_size, out_features, x.shape[-1])
    # A zero point takes its share of sums apart from that of the codes.
    zero = None if zero_point is None else -zero_point.abs()
    terms = values_of(packed, table.abs(), absmax, zero, bits, block_size, out_features, x.shape[-1])
    expected, magnitude = x.double() @ weight.t(), x.double().abs() @ terms.t()
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    rounding = 2.0**-20 + (2 * HALF_ULP[compute_dtype] if compute_dtype != torch.float32 else 0)
    bound = expected.abs() * HALF_ULP[y.dtype] + magnitude * rounding
    assert y.isfinite().all() and ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("name, arguments", [pytest.param(n, a, id=n) for n, a in cases()])
def test_cases(name, arguments):
    check(**arguments)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("in_features", [64, 128, 320, 97, 1])
@pytest.mark.parametrize("block_size", [0, 32, 64, 96, 128, 160, 16, 5])
def test_any_shape_and_block_size(block_size, in_features, bits, compute_dtype):
    """Rows that chunks of 128 and groups do and do not divide, one token to panels of them."""
    generator = torch.Generator().manual_seed(block_size)
    weight = made(generator, 7, in_features, bits, block_size, bits == 2, True, True)
    bias = torch.randn(7, generator=generator)
    for tokens in (1, 2, 3, 5, 18):
        x = torch.randn(tokens, in_features, generator=generator)
        check(x, **weight, bias=bias, out_features=7, compute_dtype=compute_dtype)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("every", [1, 2, 7, 40])
def test_any_number_of_outliers(every, bits):
    """None, some, and more than are taken out one by one: against a background that is some 10,000 times smaller."""
    generator = torch.Generator().manual_seed(every)
    weight = made(generator, 40, 576, bits, 64, True, True, True)
    x = torch.randn(5, 576, generator=generator)
    x[:, ::every] *= 1e4
    x[2] = 0
    x[2, 575] = 1.0
    check(x.bfloat16(), **weight, bias=None, out_features=40, compute_dtype=torch.bfloat16)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [1e-20, 3e-4, 7.0, 1e20])
def test_tables_of_any_size(size, bits):
    """An entry is rounded in steps of its table's largest, and each row has its own."""
    generator = torch.Generator().manual_seed(bits)
    weight = made(generator, 20, 640, bits, 0, True, False, False)
    weight["table"] *= size * torch.logspace(-3, 3, 20).unsqueeze(1)
    x = torch.randn(3, 640, generator=generator).bfloat16()
    check(x, **weight, bias=None, out_features=20, compute_dtype=torch.bfloat16)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_integers_are_exact(bits):
    """Nothing is rounded: x and the table are small integers."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (24, 384), generator=generator).to(torch.uint8)
    table = torch.arange(1 << bits, dtype=torch.float32) - (1 << (bits - 1))
    x = torch.zeros(2, 384)
    x[0, ::64], x[1, 5::128] = 1.0, -1.0
    y = linear_table(x, pack_planes(codes, bits), table, None, None, None, bits, 0, 24, torch.bfloat16)
    torch.testing.assert_close(y, x @ table[codes.long()].t(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e36])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_that_have_no_step_in_16_bits(bits, value):
    generator = torch.Generator().manual_seed(4)
    weight = made(generator, 16, 256, bits, 64, False, True, False)
    x = torch.randn(3, 256, generator=generator).bfloat16()
    more = {"bias": None, "out_features": 16, "compute_dtype": torch.bfloat16}
    expected = linear_table(x[[0, 2]], **weight, **more)
    x[1] = value
    y = linear_table(x, **weight, **more)
    torch.testing.assert_close(y[[0, 2]], expected, rtol=2.0**-6, atol=0.1)
    assert value == 1e36 or not y[1].isfinite().any()


def test_many_panels(monkeypatch):
    monkeypatch.setattr(module, "_PANEL_BYTES", 10_000)
    generator = torch.Generator().manual_seed(1)
    weight = made(generator, 60, 191, 3, 64, True, True, True)
    x = torch.randn(20, 191, generator=generator)
    check(x, **weight, bias=x[0, :60].clone(), out_features=60, compute_dtype=torch.float32)


def test_strides_do_not_matter():
    generator = torch.Generator().manual_seed(2)
    weight = made(generator, 16, 128, 3, 64, False, True, False)
    x = torch.randn(128, 3, generator=generator).t()
    more = {"bias": None, "out_features": 16, "compute_dtype": torch.float32}
    torch.testing.assert_close(linear_table(x, **weight, **more), linear_table(x.contiguous(), **weight, **more))


def test_no_tokens():
    weight = made(torch.Generator(), 8, 64, 3, 64, False, True, False)
    assert linear_table(torch.empty(2, 0, 64), **weight, bias=None, out_features=8, compute_dtype=torch.float32).shape == (2, 0, 8)


def test_tensors_of_the_wrong_size_are_refused():
    if cpu.variant() is None:
        pytest.skip("torch refuses them in its own words")
    given = made(torch.Generator(), 8, 64, 3, 64, False, True, False)
    given |= {"x": torch.ones(1, 64), "bias": None, "out_features": 8, "compute_dtype": torch.float32}
    for change, message in (
        ({"packed": given["packed"][:4]}, "packed has 96 elements of torch.uint8, expected 192"),
        ({"absmax": given["absmax"][:7]}, "absmax has 7 elements of torch.float32, expected 8"),
        ({"zero_point": given["absmax"].half()}, "zero_point has 8 elements of torch.float16, expected 8 of torch.float32"),
        ({"bias": torch.ones(1)}, "bias has 1 elements"),
        ({"table": torch.ones(16)}, "table is .16., expected .8. or .8, 8."),
    ):
        with pytest.raises(ValueError, match=message):
            linear_table(**given | change)
