"""Adapters on every scheme: their gradients are those on the dequantized weights."""

import pytest
import torch
from torch import nn

import qcli
from qcli.finetuning import lora
from qcli.finetuning.batches import Batch
from qcli.finetuning.loss import Loss
from qcli.nn.quantized_linear import QuantizedLinear
from tests.models import make_model

IDS = torch.randint(1, 200, (2, 24), generator=torch.Generator().manual_seed(1))
FORMS = {
    "nf4": {"bits": 4},
    "fp4": {"method": "fp4"},
    "llm-int8": {"bits": 8},
    "rtn-4": {"method": "rtn", "group_size": 32},
    "rtn-4-zeros": {"method": "rtn", "group_size": 32, "settings": {"zero_point": "true"}},
    "rtn-3": {"method": "rtn", "bits": 3, "group_size": 32},
    "rtn-2": {"method": "rtn", "bits": 2, "group_size": 32},
    "rtn-8": {"method": "rtn", "bits": 8, "group_size": 32},
    "gptq": {"method": "rtn", "group_size": 32, "format": "gptq"},
    "awq": {"method": "rtn", "group_size": 32, "format": "awq", "settings": {"zero_point": "true"}},
    "hqq": {"method": "hqq", "group_size": 64},
    "int8": {"method": "int8"},
    "fp8": {"method": "fp8"},
    "mxfp4": {"method": "mxfp4"},
    "nvfp4": {"method": "nvfp4"},
    "nf3": {"method": "nf3"},
    "kmeans": {"method": "kmeans"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "llama"
    make_model("llama", folder, torch.float32)
    return folder


def gradients(model):
    lora.attach(model, lora.linear_modules(model), 4, 8, 0.0, False, 0)
    generator = torch.Generator().manual_seed(3)
    parameters = lora.adapter_parameters(model)
    for name, parameter in parameters.items():
        if ".lora_B." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    Loss(model, torch.device("cpu"), "m", False)(Batch(IDS, torch.ones_like(IDS, dtype=torch.bool)), 1 / 46)
    assert all(bool(parameter.grad.any()) for parameter in parameters.values())
    return torch.cat([parameter.grad.flatten() for parameter in parameters.values()])


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_on_the_dequantized_weights(form, base, tmp_path):
    qcli.quantize(str(base), str(tmp_path / form), **FORMS[form])
    model, _ = qcli.load(str(tmp_path / form), device="cpu", dtype="float32")
    dense, _ = qcli.load(str(tmp_path / form), device="cpu", dtype="float32")
    rounds = False
    for name, module in list(dense.named_modules()):
        if isinstance(module, QuantizedLinear):
            rounds |= module.rounds_activations
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight.data = module.dequantize(torch.float32)
            if module.bias is not None:
                plain.bias.data = module.bias.data.float()
            dense.set_submodule(name, plain)
    found, expected = gradients(model), gradients(dense)
    if rounds:  # the loss is that of the rounded model, so its gradient is near, and no more
        assert torch.nn.functional.cosine_similarity(found, expected, 0) > 0.95
    else:
        assert (found - expected).norm() <= 1e-2 * expected.norm()
