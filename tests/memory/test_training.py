"""Training's bytes against published counts, and against what autograd keeps alive in transformers' Llama."""

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, masking_utils

from qcli.errors import UsageError
from qcli.finetuning import lora
from qcli.finetuning.batches import Batch
from qcli.finetuning.loss import Loss
from qcli.memory.costs.training import training
from qcli.memory.model.config import ModelConfig
from tests.memory.live import Live, fused_attention

LLAMA = dict(
    vocab_size=128, num_hidden_layers=6, hidden_size=512, intermediate_size=1536, num_attention_heads=8, num_key_value_heads=4
)


def llama(**fields) -> ModelConfig:
    return ModelConfig({"model_type": "llama", "dtype": "bfloat16"} | LLAMA | fields, "config.json")


def shapes(layers, h, f, g) -> list[tuple[int, int]]:
    """[out, in] of every linear layer of a Llama."""
    return [(h, h), (g, h), (g, h), (h, h), (f, h), (f, h), (h, f)] * layers


@pytest.mark.parametrize(
    ("sizes", "rank", "expected"),
    [
        ((32, 4096, 14336, 1024), 16, 41_943_040),  # Llama-3.1-8B
        ((32, 4096, 14336, 1024), 64, 167_772_160),
        ((32, 4096, 11008, 4096), 64, 159_907_840),  # Llama-2-7B
    ],
)
def test_adapter_counts(sizes, rank, expected):
    found = training(llama(), shapes(*sizes), 0, 1, rank=rank, train="lora")
    assert found.adapter_parameters == expected
    assert [found.components[name] for name in ("adapters", "gradients of adapters", "AdamW's moments")] == [
        4 * expected,
        4 * expected,
        8 * expected,
    ]
    assert found.total == sum(found.components.values())


@pytest.mark.parametrize(
    ("others", "nf4", "expected"),
    [
        (2 * 128256 * 4096 + 65 * 4096, 5.702, 7.804),  # Llama-3.1-8B
        (2 * 128256 * 8192 + 161 * 8192, 39.517, 43.722),  # Llama-3.1-70B
        (2 * 32000 * 4096 + 65 * 4096, 4.125, 4.650),  # Mistral-7B
    ],
)
def test_weights_prepared_for_training(others, nf4, expected):
    casts = training(llama(), [(1, 1)], others, 1).components["float32 casts"]
    assert nf4 + casts / 1e9 == pytest.approx(expected, abs=0.001)
    assert "float32 casts" not in training(llama(), [(1, 1)], others, 1, train="lora").components


class FourBit(nn.Linear):
    """A product in 16 bit whose input and output are in the dtype of the stream, as bitsandbytes' Linear4bit makes it."""

    def forward(self, x):
        return nn.functional.linear(x.to(torch.bfloat16), self.weight).to(x.dtype)


class Adapted(nn.Module):
    """PEFT's LoRA around a product: float32 adapters, a scale, and the sum in the product's dtype."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, 1, bias=False, dtype=torch.float32)
        self.b = nn.Linear(1, base.out_features, bias=False, dtype=torch.float32)

    def forward(self, x):
        y = self.base(x)
        return (y + self.b(self.a(x.float())) * 2.0).to(y.dtype)


def measured(train: str, checkpointing: bool, tokens: int, fields: dict) -> int:
    """Bytes beyond weights at the peak of one step."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**LLAMA | fields), dtype=torch.bfloat16)
        model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if name.endswith("proj"):
                owner, _, own = name.rpartition(".")
                if train == "qlora":
                    module.__class__ = FourBit
                setattr(model.get_submodule(owner), own, Adapted(module))
        if train == "qlora":
            for name, parameter in model.named_parameters():
                if "proj" not in name:
                    parameter.data = parameter.data.float()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        with Live([*model.parameters(), *model.buffers()]) as live:
            out = model(ids, labels=ids, use_cache=False)  # which holds the logits while the loss goes back
            out.loss.backward()
    return live.peak


@pytest.mark.parametrize("train", ["qlora", "lora"])
@pytest.mark.parametrize(
    ("checkpointing", "fields"),
    [
        (True, {}),
        (True, {"num_hidden_layers": 3, "intermediate_size": 2048, "num_key_value_heads": 8}),
        (True, {"num_hidden_layers": 2, "vocab_size": 16384}),
        (False, {}),
        (False, {"hidden_size": 1024, "intermediate_size": 2048, "head_dim": 64}),
    ],
)
def test_activations_are_within_5_percent_of_what_autograd_keeps(monkeypatch, train, checkpointing, fields):
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", fused_attention)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)  # reads values
    found = training(llama(**fields), [], 0, 2048, train=train, checkpointing=checkpointing)
    assert found.total == pytest.approx(measured(train, checkpointing, 2048, fields), rel=0.05)


def finetuned(checkpointing: bool, tokens: int, fields: dict, rank: int) -> int:
    """Bytes beyond weights, adapters and their gradients at the peak of one step of qcli's own."""
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**LLAMA | fields), dtype=torch.bfloat16)
    lora.attach(model, lora.linear_modules(model), rank, 1, 0.0, False, 0)
    model.eval()
    loss = Loss(model, torch.device("cpu"), "m", checkpointing)
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool))
    loss(Batch(ids[:, :4], batch.trained[:, :4]), 1.0)  # makes the gradients of adapters
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with Live([*model.parameters(), *model.buffers(), *gradients]) as live:
        loss(batch, 1.0)
    return live.peak


@pytest.mark.parametrize(
    ("checkpointing", "fields", "rank"),
    [
        (True, {}, 1),
        (True, {"num_hidden_layers": 3, "intermediate_size": 2048, "num_key_value_heads": 8}, 16),
        (True, {"num_hidden_layers": 2, "vocab_size": 16384}, 1),
        (False, {}, 16),
        (False, {"hidden_size": 1024, "intermediate_size": 2048, "head_dim": 64}, 1),
        (False, {"num_hidden_layers": 2, "vocab_size": 98304}, 1),
    ],
)
def test_qclis_own_activations_are_within_5_percent_of_what_autograd_keeps(monkeypatch, checkpointing, fields, rank):
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", fused_attention)
    config = llama(**fields)
    linears = shapes(config.layers, config.hidden_size, config.intermediate_size, config.kv_heads * config.head_dim)
    found = training(config, linears, 0, 256, rank=rank, train="finetune", checkpointing=checkpointing).components
    others = ("adapters", "gradients of adapters", "AdamW's moments", "one weight expanded")
    passing = sum(size for name, size in found.items() if name not in others)
    assert passing == pytest.approx(finetuned(checkpointing, 256, fields, rank), rel=0.05)


def test_one_weight_is_expanded_for_the_backward_pass():
    found = training(llama(), shapes(32, 4096, 14336, 1024), 0, 1)
    assert found.components["one weight expanded"] == 4096 * 14336 * 2
    assert len(found.formula) == 4


def test_what_is_asked_wrongly():
    with pytest.raises(UsageError, match="train is 'full', expected one of qlora, lora, finetune"):
        training(llama(), [], 0, 1, train="full")
    with pytest.raises(UsageError, match="rank is 0"):
        training(llama(), [], 0, 1, rank=0)
