"""A whole run: what it writes, how it goes on after it was stopped, and what stops it."""

import json
import os
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

import qcli
from qcli.errors import CheckpointError, Interrupted, NonFiniteError, PlanError, UsageError
from qcli.finetuning import finetune as verb
from qcli.finetuning import run as runs
from tests.conftest import ROOT
from tests.models import add_tokenizer, make_model

WORDS = ("red", "green", "blue", "grey")
OPTIONS = {"rank": 4, "alpha": 8, "steps": 6, "batch": 4, "lr": 1e-2, "max_tokens": 64, "device": "cpu"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "llama"
    make_model("llama", folder)
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "llama-nf4"
    qcli.quantize(str(base), str(folder), bits=4)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = [{"prompt": f"{i} is ", "completion": f"{WORDS[i % 4]} and {WORDS[i % 3]}{'!' * (i % 7)}"} for i in range(24)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def unbroken(quantized, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken") / "adapter"
    return qcli.finetune(str(quantized), data, output, **OPTIONS, settings={"eval_steps": 2, "dropout": 0.1}), output


def contents(folder):
    """The bytes of a run that are the same in every one of it."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != runs.LOG}
    lines = [json.loads(line) for line in (folder / runs.LOG).read_text().splitlines()]
    return found, [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def test_the_held_out_loss_falls_and_the_base_stays(unbroken, quantized):
    result, output = unbroken
    assert result.after < result.before and result.after == min(loss for _, _, loss in result.losses if loss is not None)
    assert len(result.samples) == 1 and len(result.base_hash) == 64
    log = [json.loads(line) for line in (output / runs.LOG).read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6] and all("held_out_loss" in log[i] for i in (1, 3, 5))
    about = json.loads((output / "qcli.json").read_text())
    assert about["base"]["name"] == str(quantized) and about["base"]["fingerprint"] and about["best_step"] == result.best


def test_parameters_are_counted_by_the_formula(unbroken):
    result, output = unbroken
    tensors = load_file(output / "adapter_model.safetensors")
    llama = 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))  # q, o; k, v of half the heads; three of the MLP
    assert result.parameters == sum(t.numel() for t in tensors.values()) == 4 * llama


def test_the_folder_is_what_peft_writes(unbroken):
    _, output = unbroken
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["inference_mode"]) == ("LORA", 4, 8, True)
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert os.path.isabs(config["base_model_name_or_path"])
    tensors = load_file(output / "adapter_model.safetensors")
    assert set(tensors) == {
        f"base_model.model.model.layers.{i}.{module}.lora_{x}.weight"
        for i in range(2)
        for module in (*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down")))
        for x in "AB"
    }
    assert all(t.dtype == torch.float32 for t in tensors.values())
    modes = {stat.S_IMODE(path.stat().st_mode) for path in output.iterdir()}
    mask = os.umask(0)
    os.umask(mask)
    assert modes == {0o666 & ~mask}
    transformers.AutoTokenizer.from_pretrained(output)


def test_plain_peft_loads_it_on_bitsandbytes_and_on_the_original(unbroken, quantized, base):
    """On the quantized base the logits are those of the adapter that qcli has trained."""
    _, output = unbroken
    ids = torch.arange(1, 17)[None]
    model, _ = qcli.load(str(quantized), device="cpu", dtype="float32")
    from qcli.finetuning import lora

    adapted = lora.attach(model, lora.linear_modules(model), 4, 8, 0.0, False, 0)
    tensors = load_file(output / "adapter_model.safetensors")
    for name, parameter in lora.adapter_parameters(adapted).items():
        parameter.data.copy_(tensors[f"base_model.model.{name.removeprefix('base_model.model.')}".replace(".default", "")])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    for folder, exact in ((quantized, True), (base, False)):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for module in theirs.modules():
            if hasattr(module, "compute_dtype"):
                module.compute_dtype = torch.float32
                module.weight.quant_state.dtype = torch.float32
        for parameter in theirs.parameters():
            if parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()
        with torch.no_grad():
            plain = theirs(input_ids=ids).logits
            found = PeftModel.from_pretrained(theirs, str(output)).eval()(input_ids=ids).logits
        assert (found - plain).abs().max() > 1e-3
        assert torch.allclose(found, expected, atol=1e-4) == exact


class Crash(BaseException):
    """Ends a run as a kill would: nothing is saved after it."""


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_run_that_crashed_goes_on_to_the_same_bytes(unbroken, quantized, data, tmp_path, monkeypatch, at):
    _, expected = unbroken
    output = tmp_path / "adapter"
    options = OPTIONS | {"settings": {"eval_steps": 2, "dropout": 0.1}}
    step = runs.Run._step

    def crashing(self, number, tokens, advance):
        if number == at:
            raise Crash
        step(self, number, tokens, advance)

    monkeypatch.setattr(runs.Run, "_step", crashing)
    with pytest.raises(Crash):
        qcli.finetune(str(quantized), data, output, **options)
    assert not output.exists()
    monkeypatch.setattr(runs.Run, "_step", step)
    qcli.finetune(str(quantized), data, output, **options)
    found, wanted = contents(output), contents(expected)
    assert found == wanted
    assert not output.with_name("adapter.partial").exists()


def test_a_killed_process_goes_on(unbroken, quantized, data, tmp_path):
    _, expected = unbroken
    output = tmp_path / "adapter"
    arguments = [str(quantized), str(data), "-o", str(output), "--rank", "4", "--alpha", "8", "--steps", "6", "--batch", "4"]
    arguments += ["--lr", "1e-2", "--max-tokens", "64", "--device", "cpu", "--set", "eval_steps=2", "--set", "dropout=0.1"]
    command = [sys.executable, "-m", "qcli", "finetune", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = output.with_name("adapter.partial") / runs.LOG
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not output.exists():
        qcli.finetune(str(quantized), data, output, **OPTIONS, settings={"eval_steps": 2, "dropout": 0.1})
    assert contents(output) == contents(expected)


def test_ctrl_c_keeps_the_steps_that_are_done(unbroken, quantized, data, tmp_path, monkeypatch):
    _, expected = unbroken
    output = tmp_path / "adapter"
    options = OPTIONS | {"settings": {"eval_steps": 2, "dropout": 0.1}}
    step = runs.Run._step

    def interrupted(self, number, tokens, advance):
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        step(self, number, tokens, advance)

    monkeypatch.setattr(runs.Run, "_step", interrupted)
    with pytest.raises(Interrupted, match="interrupted after 3 of 6 steps"):
        qcli.finetune(str(quantized), data, output, **options)
    monkeypatch.setattr(runs.Run, "_step", step)
    qcli.finetune(str(quantized), data, output, **options)
    assert contents(output) == contents(expected)


def test_the_8_bit_optimizer_goes_on_to_the_same_bytes(base, data, tmp_path, monkeypatch):
    """Of bitsandbytes. It keeps moments in 8 bits from 4,096 elements on, so the rank is large."""
    options = OPTIONS | {"rank": 64, "steps": 3, "settings": {"eval_steps": 1, "optimizer": "paged-adamw-8bit"}}
    result = qcli.finetune(str(base), data, tmp_path / "unbroken", **options)
    assert result.after < result.before
    step = runs.Run._step

    def crashing(self, number, tokens, advance):
        if number == 2:
            raise Crash
        step(self, number, tokens, advance)

    monkeypatch.setattr(runs.Run, "_step", crashing)
    with pytest.raises(Crash):
        qcli.finetune(str(base), data, tmp_path / "adapter", **options)
    state = tmp_path / "adapter.partial" / ".qcli" / "state.safetensors"
    assert any(t.dtype == torch.uint8 for t in load_file(state).values())
    monkeypatch.setattr(runs.Run, "_step", step)
    qcli.finetune(str(base), data, tmp_path / "adapter", **options)
    assert contents(tmp_path / "adapter") == contents(tmp_path / "unbroken")


def test_ctrl_c_while_the_held_out_loss_is_measured_loses_no_measurement(unbroken, quantized, data, tmp_path, monkeypatch):
    _, expected = unbroken
    output = tmp_path / "adapter"
    options = OPTIONS | {"settings": {"eval_steps": 2, "dropout": 0.1}}
    held_out, calls = runs.Trainer.held_out, []

    def interrupted(self, rows):
        calls.append(len(calls))
        if len(calls) == 3:  # before the first step, after the second, after the fourth
            os.kill(os.getpid(), signal.SIGINT)
        return held_out(self, rows)

    monkeypatch.setattr(runs.Trainer, "held_out", interrupted)
    with pytest.raises(Interrupted, match="interrupted after 4 of 6 steps"):
        qcli.finetune(str(quantized), data, output, **options)
    monkeypatch.setattr(runs.Trainer, "held_out", held_out)
    qcli.finetune(str(quantized), data, output, **options)
    assert contents(output) == contents(expected)


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch": 5}, {"lr": 2e-2}, {"rank": 8}, {"held_out": 0.25}])
def test_another_plan_does_not_go_on(quantized, data, tmp_path, monkeypatch, change):
    output = tmp_path / "adapter"

    def crashing(self, progress):
        raise Crash

    monkeypatch.setattr(runs.Run, "_steps", crashing)
    with pytest.raises(Crash):
        qcli.finetune(str(quantized), data, output, **OPTIONS)
    with pytest.raises(PlanError, match="was started by a run that differs") as refused:
        qcli.finetune(str(quantized), data, output, **OPTIONS | change)
    name = next(iter(change)).replace("held_out", "held-out rows")
    assert f"its {name} was" in refused.value.message


def test_another_base_or_other_data_do_not_go_on(quantized, base, data, tmp_path, monkeypatch):
    output = tmp_path / "adapter"
    monkeypatch.setattr(runs.Run, "_steps", lambda self, progress: (_ for _ in ()).throw(Crash))
    with pytest.raises(Crash):
        qcli.finetune(str(quantized), data, output, **OPTIONS)
    other = tmp_path / "train.jsonl"
    other.write_text(data.read_text().replace("blue", "teal"))
    with pytest.raises(PlanError, match="its data was"):
        qcli.finetune(str(quantized), other, output, **OPTIONS)
    with pytest.raises(PlanError, match="its base was"):
        qcli.finetune(str(base), data, output, **OPTIONS)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_adapter(quantized, data, tmp_path, monkeypatch):
    output = tmp_path / "adapter"
    step = runs.Trainer.step
    kept = {}

    def broken(self, rows, lr, number):
        if number == 2:
            kept.update({name: parameter.detach().clone() for name, parameter in self.parameters.items()})
            self.model.get_input_embeddings().weight.data[:] = float("nan")
        return step(self, rows, lr, number)

    monkeypatch.setattr(runs.Trainer, "step", broken)
    with pytest.raises(NonFiniteError, match="step 3: the loss is nan") as stopped:
        qcli.finetune(str(quantized), data, output, **OPTIONS, settings={"eval_steps": 1})
    assert not output.exists() and "the adapter of step" in stopped.value.message
    tensors = load_file(output.with_name("adapter.partial") / "adapter_model.safetensors")
    assert all(t.isfinite().all() for t in tensors.values())
    name = "model.layers.0.self_attn.q_proj.lora_B"
    assert torch.equal(tensors[f"base_model.model.{name}.weight"], kept[f"{name}.default.weight"])


def test_a_damaged_base_stops_before_training(base, data, tmp_path):
    broken = tmp_path / "broken"
    model = make_model("llama", broken)
    add_tokenizer(broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    assert model
    with pytest.raises(NonFiniteError, match="held-out loss"):
        qcli.finetune(str(broken), data, tmp_path / "adapter", **OPTIONS)


def test_the_best_step_is_kept(quantized, data, tmp_path, monkeypatch):
    """A learning rate far too large: a later step is worse, and the adapter is that of the best one."""
    losses = iter([5.0, 4.0, 3.0, 6.0, 3.0, 7.0, 8.0])
    saved = {}
    monkeypatch.setattr(runs.Trainer, "held_out", lambda self, rows: next(losses))
    copy = runs.Run._copy

    def noted(self):
        saved[self.state.step] = copy(self)
        return saved[self.state.step]

    monkeypatch.setattr(runs.Run, "_copy", noted)
    result = qcli.finetune(str(quantized), data, tmp_path / "adapter", **OPTIONS | {"steps": 5}, settings={"eval_steps": 1})
    assert (result.best, result.before) == (2, 5.0)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj.lora_A"
    assert torch.equal(tensors[f"base_model.model.{name}.weight"], saved[2][f"{name}.default.weight"])


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_an_unquantized_model_is_trained_as_it_is_or_quantized_as_read(base, data, tmp_path, bits):
    result = qcli.finetune(str(base), data, tmp_path / "adapter", **OPTIONS | {"steps": 2}, bits=bits)
    assert result.after < result.before


def test_options_out_of_range_are_refused(base, quantized, data, tmp_path):
    def refused(words, kind=UsageError, model=base, **options):
        with pytest.raises(kind, match=words):
            verb.planned(str(model), data, tmp_path / "adapter", **OPTIONS | options)

    refused("--rank is 0", rank=0)
    refused("--lr is nan", lr=float("nan"))
    refused("--epochs and --steps were both given", epochs=1.0)
    refused("--eval is 1.5", held_out=1.5)
    refused("there is no .*absent", held_out="absent.jsonl")
    refused("--target 'x_proj' matches no linear module", target="x_proj")
    refused("finetune has no setting 'drop'; nearest: dropout", settings={"drop": "1"})
    refused("dropout is 1", settings={"dropout": "1"})
    refused("schedule is 'step'", settings={"schedule": "step"})
    refused("is quantized already", CheckpointError, model=quantized, bits=4)
    refused("--too-long is 'squeeze'", too_long="squeeze")
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="there exists already"):
        verb.planned(str(base), data, tmp_path / "there", **OPTIONS)


def test_targets_are_names_of_modules(base, data, tmp_path):
    plan = verb.planned(str(base), data, tmp_path / "adapter", **OPTIONS, target="q_proj,model.layers.1.mlp.up_proj")
    assert [name for name, _, _ in plan.targets] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    qcli.finetune(str(base), data, tmp_path / "adapter", **OPTIONS | {"steps": 1}, target="q_proj,model.layers.1.mlp.up_proj")
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 6


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "phi3", "mixtral"])
def test_other_architectures_learn(name, data, tmp_path):
    make_model(name, tmp_path / name, torch.float32)
    add_tokenizer(tmp_path / name)
    result = qcli.finetune(str(tmp_path / name), data, tmp_path / "adapter", **OPTIONS | {"steps": 4}, bits=4)
    assert result.after < result.before
