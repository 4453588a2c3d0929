import math

import pytest
import torch

from qcli.ops.activate import KINDS, _kernel, activate, cases, record
from qcli.runtime import cpu

HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

F = torch.nn.functional
ORACLES = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "quick_gelu": lambda x: x / (1 + (-1.702 * x).exp()),
}


@pytest.mark.parametrize("name, arguments", [pytest.param(n, a, id=n) for n, a in cases()])
def test_cases_equal_torchs_functions(name, arguments):
    gate, up = arguments["gate"], arguments["up"]
    y = activate(**arguments)
    factor = 1 if up is None else up.double()
    expected = ORACLES[arguments["kind"]](gate.double()) * factor
    assert y.dtype == gate.dtype and y.shape == gate.shape
    # gelu's erf is within 3e-7, the others are within a few roundings.
    bound = expected.abs() * (HALF_ULP[y.dtype] + 4e-7) + 2e-7 * (gate.double() * factor).abs() + 2.0**-25
    assert ((y.double() - expected).abs() <= bound).all()  # 2^-25 is half of float16's smallest step


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_smallest_to_the_largest(kind):
    magnitudes = torch.logspace(-38, 4, 4001)
    x = torch.cat((-magnitudes, torch.tensor([-0.0, 0.0]), magnitudes))
    y, expected = activate(x, None, kind), ORACLES[kind](x.double())
    assert y.isfinite().all()
    assert ((y.double() - expected).abs() <= 4e-7 * expected.abs() + 2e-7 * x.double().abs()).all()


def test_erf_is_within_its_bound():
    """gelu(x) / x = (1 + erf(x / sqrt 2)) / 2. The roundings of x / sqrt 2, of the sum and of y add 2e-7."""
    x = torch.linspace(-8, 8, 100001)
    ours = 2 * activate(x, None, "gelu").double() / x.double() - 1
    errors = (ours - torch.erf(x.double() / math.sqrt(2)))[x != 0].abs()
    assert errors.max() < 5e-7


def test_exp_is_within_its_bound():
    """silu(x) = x exp(x) / (1 + exp(x)). Far below zero this is x exp(x)."""
    x = -torch.linspace(20, 87, 200001)
    ours = activate(x, None, "silu").double() / x.double()
    errors = (ours / x.double().exp() - 1).abs()
    assert errors.max() < 3e-7  # of exp, and of two more roundings
    assert (activate(torch.tensor([-104.0, -1e30]), None, "silu") == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity(kind):
    x = torch.tensor([torch.nan, torch.inf, 1.0])
    y = activate(x, None, kind)
    assert y[0].isnan() and y[1] == torch.inf and y[2].isfinite()
    assert activate(torch.ones(3), x, kind).isnan().tolist() == [True, False, False]


def test_another_kind_or_shape_is_refused():
    with pytest.raises(ValueError, match="kind is 'swish', expected one of silu, gelu, gelu_tanh, relu, relu2, quick_gelu"):
        activate(torch.zeros(1, 4), None, "swish")
    with pytest.raises((ValueError, RuntimeError)):
        activate(torch.zeros(1, 4), torch.zeros(1, 5), "silu")


class TestRecord:
    """What a program asks of the kernel beyond the op."""

    @pytest.fixture(autouse=True)
    def compiled(self, variant):
        if variant == cpu.REFERENCE:
            pytest.skip("there is no kernel")

    @pytest.mark.parametrize("n", [1, 16, 40, 4097])
    def test_halves_of_one_product_in_place(self, n):
        fused = torch.randn(3, 2 * n + 5, generator=torch.Generator().manual_seed(0))
        gate, up = fused[:, :n], fused[:, n : 2 * n]
        expected, rest = activate(gate, up, "silu"), fused[:, n:].clone()
        made = record(gate, up, gate, "silu")
        _kernel(made.address, 3, 0)
        assert torch.equal(gate, expected) and torch.equal(fused[:, n:], rest)

    @pytest.mark.parametrize("tokens, n", [(1, 20000), (8, 1536), (3, 4097), (2, 8192)])
    def test_threads_do_not_matter(self, tokens, n, monkeypatch):
        gate, up = torch.randn(2, tokens, n, generator=torch.Generator().manual_seed(0))
        one = activate(gate, up, "gelu")
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
        assert torch.equal(activate(gate, up, "gelu"), one)

    def test_what_does_not_fit(self):
        x = torch.zeros(2, 8)
        with pytest.raises(TypeError, match="activate: up is torch.float16, expected float32"):
            record(x, x.half(), x, "silu")
        with pytest.raises(ValueError, match=r"activate: y is \[2, 7\], expected \['tokens', 8\]"):
            record(x, None, torch.zeros(2, 7), "silu")
