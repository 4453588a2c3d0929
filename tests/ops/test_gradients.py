"""The gradient of each product with respect to x, against that of x times the dequantized weight in float64."""

from importlib import import_module

import pytest
import torch

from qcli.ops import _library
from qcli.ops.dequantize_4bit import decoded_absmax, dequantize_4bit
from qcli.ops.dequantize_table import dequantize_table
from qcli.ops.linear_w8a16 import widened

HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def _4bit(a):
    absmax = decoded_absmax(a["absmax"], a["nested_absmax"], a["offset"], a["quant_type"])
    shape = [a["out_features"], a["x"].shape[-1]]
    return dequantize_4bit(a["packed"], absmax, a["block_size"], a["quant_type"], shape, torch.float32, a["zero_point"])


def _table(a):
    tensors = [a[name] for name in ("packed", "table", "absmax", "zero_point")]
    return dequantize_table(*tensors, a["bits"], a["block_size"], a["out_features"], a["x"].shape[-1], torch.float32)


def _int8(a):
    weight = a["weight"].float() * (a["scale"].unsqueeze(1) / 127)
    if a.get("fixed") is not None:
        weight[:, a["fixed"].long()] = a["original"].float()
    return weight


def _w8a16(a):
    if a["scale"].dim() == 1:
        return _int8(a)
    return widened(a["weight"], a["scale"], a["group_size"] or a["x"].shape[-1], a["zero_point"])


WEIGHTS = {"linear_4bit": _4bit, "linear_int8": _int8, "linear_table": _table, "linear_w8a16": _w8a16}


def function(name):
    return getattr(import_module(f"qcli.ops.{name}"), name)


def some_cases(name):
    return list(import_module(f"qcli.ops.{name}").cases())[::5]


@pytest.mark.parametrize("name", WEIGHTS)
def test_equals_that_of_the_dequantized_product(name):
    for case, arguments in some_cases(name):
        x = arguments["x"].clone().requires_grad_()
        y = function(name)(**arguments | {"x": x})
        of_result = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
        (found,) = torch.autograd.grad(y, x, of_result)
        weight, exact = WEIGHTS[name](arguments).double(), arguments["x"].double().requires_grad_()
        (expected,) = torch.autograd.grad(torch.nn.functional.linear(exact, weight), exact, of_result.double())
        assert found.dtype == x.dtype and found.shape == x.shape, case
        computed = arguments.get("compute_dtype", x.dtype)
        # Of the weight and the result's gradient to the compute dtype, of sums, and of the gradient to x's dtype.
        bound = (2 * HALF_ULP[computed] + 2.0**-20) * (of_result.double().abs() @ weight.abs()) + HALF_ULP[x.dtype] * expected.abs()
        assert ((found.double() - expected).abs() <= bound + 1e-7).all(), case


@pytest.mark.parametrize("panel", [1, 3000])
@pytest.mark.parametrize("name", WEIGHTS)
def test_panels_of_rows_add_up_to_the_whole(name, panel, monkeypatch):
    gradients, most = {}, 0
    for bytes_ in (1 << 30, panel):
        monkeypatch.setattr(_library, "_PANEL_BYTES", bytes_)
        for case, arguments in some_cases(name):
            x = arguments["x"].clone().requires_grad_()
            y = function(name)(**arguments | {"x": x})
            of_result = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
            (found,) = torch.autograd.grad(y, x, of_result)
            whole = gradients.setdefault(case, found)
            size = (of_result.float().abs() @ WEIGHTS[name](arguments).abs()).clamp_(min=1e-7)
            most = max(most, ((found.float() - whole.float()).abs() / size).max().item())
            assert ((found.float() - whole.float()).abs() <= (4 * HALF_ULP[min_dtype(x, arguments)] + 2.0**-20) * size).all(), case
    assert most > 0  # the panels were panels


def min_dtype(x, arguments):
    """The coarser of x's dtype and the one that the product is made in."""
    return max((x.dtype, arguments.get("compute_dtype", x.dtype)), key=HALF_ULP.get)


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_result_is_that_without_gradients(name):
    for case, arguments in some_cases(name):
        with torch.no_grad():
            expected = function(name)(**arguments)
        y = function(name)(**arguments | {"x": arguments["x"].clone().requires_grad_()})
        assert y.requires_grad and torch.equal(y, expected), case
        assert not function(name)(**arguments).requires_grad, case


@pytest.mark.parametrize("name", WEIGHTS)
def test_compiles_with_its_gradient(name):
    _, arguments = some_cases(name)[0]
    product, x = function(name), arguments["x"].clone().requires_grad_()

    def loss(x):
        return product(**arguments | {"x": x}).float().square().sum()

    with torch.compiler.set_stance("default"):
        torch.compiler.reset()
        (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(found, torch.autograd.grad(loss(x), x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WEIGHTS)
def test_opcheck(name):
    _, arguments = some_cases(name)[0]
    torch.library.opcheck(getattr(torch.ops.qcli, name).default, (), arguments | {"x": arguments["x"].clone().requires_grad_()})


def test_it_flows_through_layers():
    """Two products and what is between them, as in fine-tuning with a frozen weight."""
    _, arguments = some_cases("linear_4bit")[0]
    x = torch.randn(4, arguments["x"].shape[-1], generator=torch.Generator().manual_seed(1))
    arguments |= {"x": x, "compute_dtype": torch.float32, "bias": None}
    weight = _4bit(arguments).double()
    scale = torch.ones(x.shape[-1], requires_grad=True)
    function("linear_4bit")(**arguments | {"x": x * scale}).square().sum().backward()
    exact = torch.ones(x.shape[-1], dtype=torch.float64, requires_grad=True)
    torch.nn.functional.linear(x.double() * exact, weight).square().sum().backward()
    torch.testing.assert_close(scale.grad.double(), exact.grad, rtol=1e-4, atol=1e-3)
