import pytest
import torch

from qcli.ops.linear_float import cases, linear_float

HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def oracle(x, weight, bias):
    """The product in float64, and the sum of all terms' magnitudes."""
    added = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
    y = x.double() @ weight.double().t() + added
    return y, x.double().abs() @ weight.double().abs().t() + added.abs()


@pytest.mark.parametrize("name, arguments", [pytest.param(n, a, id=n) for n, a in cases()])
def test_cases_equal_the_oracle(name, arguments):
    """Within a few float32 roundings of the sum, and half an ulp of the result's dtype."""
    y = linear_float(**arguments)
    expected, magnitude = oracle(**arguments)
    assert y.dtype == arguments["x"].dtype and y.shape == expected.shape
    bound = expected.abs() * HALF_ULP[y.dtype] + magnitude * 2.0**-20
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("columns", [1, 15, 16, 100, 128, 200])
def test_infinity_stays_in_its_row(columns):
    """A row's load must not reach into the next row: zero times its infinity is NaN."""
    weight = torch.ones(3, columns, dtype=torch.bfloat16)
    weight[1] = torch.inf
    y = linear_float(torch.ones(2, columns), weight, None)
    assert y.tolist() == [[columns, torch.inf, columns]] * 2


def test_many_tokens_and_none():
    x, weight = torch.randn(2, 30, 48), torch.randn(5, 48).half()
    y = linear_float(x, weight, None)
    assert torch.allclose(y[0, :3], linear_float(x[0, :3], weight, None), atol=1e-5)
    assert linear_float(x[:, :0], weight, None).shape == (2, 0, 5)


def test_another_dtype_is_refused(variant):
    if variant == "reference":
        pytest.skip("the reference takes any float")
    with pytest.raises(TypeError, match="weight is torch.float64, expected float32"):
        linear_float(torch.ones(1, 8), torch.ones(2, 8, dtype=torch.float64), None)
