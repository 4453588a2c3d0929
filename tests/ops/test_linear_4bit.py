import bitsandbytes.functional as bnb
import pytest
import torch

from qcli.ops.linear_4bit import cases, linear_4bit
from qcli.ops.quantize_4bit import quantize_4bit


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


@pytest.mark.parametrize("name, arguments", [pytest.param(n, a, id=n) for n, a in cases()])
def test_cases_equal_bitsandbytes(name, arguments):
    y = linear_4bit(**arguments)
    x = arguments["x"]
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], arguments["out_features"])
    assert torch.equal(y, theirs(**arguments))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_any_compute_dtype(x_dtype, compute_dtype, quant_type):
    generator = torch.Generator().manual_seed(0)
    packed, absmax = quantize_4bit(torch.randn(24, 96, generator=generator), 64, quant_type)
    x = torch.randn(2, 3, 96, generator=generator).to(x_dtype)
    bias = torch.randn(24, generator=generator).to(x_dtype)
    arguments = (x, packed, absmax, None, 0.0, bias, 64, quant_type, 24, compute_dtype)
    y = linear_4bit(*arguments)
    assert y.dtype == x_dtype and torch.equal(y, theirs(*arguments))


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
