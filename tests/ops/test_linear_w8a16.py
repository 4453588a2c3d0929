import pytest
import torch

from qcli.ops.linear_int8 import linear_int8
from qcli.ops.linear_w8a16 import cases, linear_w8a16
from qcli.ops.quantize_int8 import quantize_int8

HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def oracle(x, weight, scale, bias, group_size=0, zero_point=None):
    """x times the dequantized weight in float64, and the sum of all terms' magnitudes, with those of zero points apart."""
    columns = weight.shape[1]
    spread = lambda values: values.double().repeat_interleave(group_size or columns, 1)[:, :columns]  # noqa: E731
    steps = spread(scale.unsqueeze(1).double() / 127 if scale.dim() == 1 else scale)
    zeros = torch.zeros(weight.shape, dtype=torch.float64) if zero_point is None else spread(zero_point)
    codes, added = weight.double(), torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
    y = x.double() @ ((codes - zeros) * steps).t() + added
    return y, x.double().abs() @ ((codes.abs() + zeros.abs()) * steps).t() + added.abs()


@pytest.mark.parametrize("name, arguments", [pytest.param(n, a, id=n) for n, a in cases()])
def test_cases_equal_the_oracle(name, arguments):
    """Within a few float32 roundings of the sum, and half an ulp of the result's dtype."""
    y = linear_w8a16(**arguments)
    expected, magnitude = oracle(**arguments)
    assert y.dtype == arguments["x"].dtype and y.shape == expected.shape
    many = arguments["x"].numel() > 16 * arguments["x"].shape[-1]  # the weight is rounded to x's dtype, too
    rounding = 2.0**-20 + (HALF_ULP[y.dtype] if many and y.dtype == torch.bfloat16 else 0)
    bound = expected.abs() * HALF_ULP[y.dtype] + magnitude * rounding
    assert y.isfinite().all() and ((y.double() - expected).abs() <= bound).all()


def test_leading_dimensions_are_rows():
    generator = torch.Generator().manual_seed(0)
    weight, scale, _ = quantize_int8(torch.randn(7, 16, generator=generator), 0.0)
    x = torch.randn(2, 3, 4, 16, generator=generator)
    y = linear_w8a16(x, weight, scale, None)
    assert y.shape == (2, 3, 4, 7) and torch.equal(y.view(-1, 7), linear_w8a16(x.view(-1, 16), weight, scale, None))
    assert linear_w8a16(x[:, :0], weight, scale, None).shape == (2, 0, 4, 7)


def test_only_the_weight_is_rounded():
    """Without outliers in the way LLM.int8() adds the error of its activations; this op adds none."""
    generator = torch.Generator().manual_seed(0)
    q, scale, _ = quantize_int8(torch.randn(64, 256, generator=generator), 0.0)
    x = torch.randn(32, 256, generator=generator)
    exact, _ = oracle(x, q, scale, None)
    ours, theirs = linear_w8a16(x, q, scale, None), linear_int8(x, q, scale, None, 6.0)
    errors = [(y.double() - exact).square().mean().sqrt() for y in (ours, theirs)]
    assert errors[0] < errors[1] / 1000


def test_nan_reaches_its_row_alone():
    weight, scale, _ = quantize_int8(torch.eye(4, 8), 0.0)
    x = torch.ones(3, 8)
    x[1, 2] = float("nan")
    y = linear_w8a16(x, weight, scale, None)
    assert y[1].isnan().all() and torch.allclose(y[[0, 2]], torch.ones(2, 4))
