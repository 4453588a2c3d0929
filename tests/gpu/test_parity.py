"""Every kernel on a GPU is compared with the reference of its op on the CPU."""

from importlib import import_module

import pytest
import torch

from qcli.ops.linear_int8 import int8_product
from tests.gpu import groups, inputs
from tests.gpu.checks import FORMS, WAYS, noting, wrong, wrong_in_rows
from tests.gpu.inputs import LAYERS, layer_4bit, layer_8bit, w8a16

# A kernel that cannot run warns, and its reference runs in its place. Here the warning is an error.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("error::qcli.errors.QcliWarning")]


@pytest.mark.parametrize("name, product", WAYS, indirect=["product"])
def test_an_ops_own_cases(name, device, product):
    every = import_module(f"qcli.ops.{name}").cases()
    with noting() as launched:
        found = {case: message for case, arguments in every if (message := wrong(name, arguments, device))}
    assert not found and launched


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name, product", WAYS, indirect=["product"])
def test_hostile_inputs(name, form, device, product):
    every = inputs.hostile(name)
    found = {case: message for case, arguments in every if (message := wrong(name, arguments, device, form))}
    assert not found


def some_rows(out_features: int) -> torch.Tensor:
    """The first element, the last, and any others."""
    ends = torch.cat([torch.arange(17), torch.arange(out_features - 17, out_features)])
    return torch.cat([ends, torch.randint(out_features, (94,))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_4_bit_layers(layer, dtype, device):
    out_features, in_features = LAYERS[layer]
    for tokens in (1, 2, 4, 7, 8, 9, 16, 32, 64, 65):
        nested, bias = tokens != 8, dtype if tokens % 2 else None
        arguments = layer_4bit(tokens, out_features, in_features, dtype, nested=nested, bias=bias, device=device)
        assert wrong_in_rows("linear_4bit", arguments, some_rows(out_features)) is None, tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_8_bit_layers(layer, dtype, device, product):
    out_features, in_features = LAYERS[layer]
    for tokens, outliers in ((1, 0), (1, 5), (3, 300), (8, 6), (9, 17), (100, 0), (513, 7)):
        bias = torch.float32 if tokens % 2 else None
        arguments = layer_8bit(tokens, out_features, in_features, dtype, outliers=outliers, bias=bias, device=device)
        rows = some_rows(out_features)
        assert wrong_in_rows("linear_int8", arguments, rows) is None, (tokens, outliers)
        if tokens < 100:
            assert wrong_in_rows("linear_w8a16", w8a16(arguments), rows) is None, (tokens, outliers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", ["llama-7b-down", "llama-70b-up"])
def test_layers_of_groups(layer, dtype, device):
    for tokens in (1, 5, 8, 16, 33, 64):
        bias = dtype if tokens % 2 else None
        rows = some_rows(LAYERS[layer][0])
        for kind in groups.FOUR:
            arguments = groups.four_bits(kind, tokens, *LAYERS[layer], dtype, bias=bias, device=device)
            assert wrong_in_rows("linear_4bit", arguments, rows) is None, (tokens, kind)
        for kind in groups.EIGHT:
            arguments = groups.eight_bits(kind, tokens, *LAYERS[layer], dtype, bias=bias, device=device)
            assert wrong_in_rows("linear_w8a16", arguments, rows) is None, (tokens, kind)


@pytest.mark.parametrize("m, n, k", [(1, 64, 64), (3, 33, 65), (17, 8, 1), (1, 1, 1), (40, 24, 11008), (0, 5, 8), (3, 0, 8)])
def test_the_integer_product_is_exact(m, n, k, device):
    a, b = (torch.randint(-128, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
    expected = (a.double() @ b.double().t()).long()
    assert torch.equal(int8_product(a.to(device), b.to(device)).cpu().long(), expected)
