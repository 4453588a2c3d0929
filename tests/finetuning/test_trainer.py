"""transformers' own Trainer on what qcli loads."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

import qcli
from qcli.finetuning.lora import attach
from tests.models import make_model


@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_trainer_trains_adapters(bits, tmp_path):
    make_model("llama", tmp_path / "model")
    model, _ = qcli.load(str(tmp_path / "model"), bits=bits, device="cpu")
    adapted = attach(model, rank=4)
    before = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    ids = torch.arange(1, 33)
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=6,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Trainer(adapted, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 12)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    changed = {name for name, parameter in adapted.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and all(".lora_" in name for name in changed)
