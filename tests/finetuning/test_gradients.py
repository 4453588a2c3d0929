"""Losses and gradients against PEFT on transformers and bitsandbytes, on one checkpoint."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import qcli
from qcli.finetuning import lora
from qcli.finetuning.batches import Batch
from qcli.finetuning.loss import Loss
from qcli.nn.quantized_linear import QuantizedLinear
from tests.conftest import ROOT

IDS = torch.randint(5, 600, (2, 80), generator=torch.Generator().manual_seed(1))
RANK, ALPHA = 8, 16


@pytest.fixture(scope="module", params=[4, 8])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / f"{request.param}"
    qcli.quantize(str(ROOT / "examples" / "demo-model"), str(folder), bits=request.param)
    return folder


def ours(folder, dtype="float32", rounds=False):
    model, _ = qcli.load(str(folder), device="cpu", dtype=dtype)
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and not rounds:
            module.rounds_activations = False
    lora.attach(model, lora.linear_modules(model), RANK, ALPHA, 0.0, False, 0)
    generator = torch.Generator().manual_seed(3)
    parameters = lora.adapter_parameters(model)
    for name, parameter in parameters.items():
        if ".lora_B." in name:  # zero at first, which would hide the gradients of A
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model, parameters


def theirs(folder, parameters, dtype=torch.float32):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for module in model.modules():
        # A layout for AVX512-BF16 has no gradient once the model has been evaluated.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        # Otherwise bitsandbytes computes in the bfloat16 that the checkpoint names, whatever the model's dtype.
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            state.dtype = dtype
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.to(dtype)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, config).train()
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found.keys() == parameters.keys()
    for name, parameter in found.items():
        parameter.data.copy_(parameters[name].data)
    return model, found


def test_float32_gradients_are_those_of_bitsandbytes_to_the_bit(checkpoint):
    model, parameters = ours(checkpoint)
    loss = Loss(model, torch.device("cpu"), "m", False)
    count = 2 * 79
    mean = float(loss(Batch(IDS, torch.ones_like(IDS, dtype=torch.bool)), 1 / count)) / count
    other, expected = theirs(checkpoint, parameters)
    found = other(input_ids=IDS, labels=IDS).loss
    found.backward()
    assert mean == pytest.approx(found.item(), rel=1e-6)
    assert len(expected) == 84
    for name, parameter in expected.items():
        assert parameter.grad.any() and torch.equal(parameters[name].grad, parameter.grad), name


def test_in_bfloat16_they_agree_within_its_rounding(checkpoint):
    model, parameters = ours(checkpoint, "bfloat16")
    loss = Loss(model, torch.device("cpu"), "m", False)
    loss(Batch(IDS, torch.ones_like(IDS, dtype=torch.bool)), 1 / 158)
    other, expected = theirs(checkpoint, parameters, torch.bfloat16)
    other(input_ids=IDS, labels=IDS).loss.backward()
    a, b = (torch.cat([each[name].grad.flatten() for name in expected]) for each in (parameters, expected))
    assert torch.nn.functional.cosine_similarity(a, b, 0) > 0.999


def test_int8_trains_as_it_runs(checkpoint):
    """With rounded activations the loss is that of `generate`'s forward, and gradients pass straight through the rounding."""
    model, parameters = ours(checkpoint, rounds=True)
    loss = Loss(model, torch.device("cpu"), "m", False)
    batch = Batch(IDS, torch.ones_like(IDS, dtype=torch.bool))
    with torch.no_grad():
        logits = model(input_ids=IDS).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits.double(), IDS[:, 1:].flatten(), reduction="sum")
    assert float(loss(batch, 1 / 158)) == pytest.approx(expected.item(), rel=1e-6)
    rounded = torch.cat([p.grad.flatten() for p in parameters.values()])
    plain, others = ours(checkpoint)
    Loss(plain, torch.device("cpu"), "m", False)(batch, 1 / 158)
    straight = torch.cat([p.grad.flatten() for p in others.values()])
    assert torch.nn.functional.cosine_similarity(rounded, straight, 0) > 0.9


def test_evaluating_and_generating_before_changes_nothing(checkpoint):
    batch = Batch(IDS, torch.ones_like(IDS, dtype=torch.bool))
    model, parameters = ours(checkpoint, "bfloat16", rounds=True)
    Loss(model, torch.device("cpu"), "m", False)(batch, 1 / 158)
    before = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    model, parameters = ours(checkpoint, "bfloat16", rounds=True)
    loss = Loss(model, torch.device("cpu"), "m", False)
    loss(batch)
    model.generate(input_ids=IDS[:1, :8], max_new_tokens=4, do_sample=False)
    loss(batch, 1 / 158)
    assert all(torch.equal(parameters[name].grad, gradient) for name, gradient in before.items())
