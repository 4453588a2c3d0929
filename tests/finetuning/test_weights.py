"""train=weights: the rounding of LLM.int8() in every pass, gradients straight through it, and a whole model at the end."""

import json
import os
import shutil
import signal
import stat

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn.functional import linear

import qcli
from qcli.errors import CheckpointError, Interrupted, NonFiniteError, UsageError
from qcli.finetuning import finetune as verb
from qcli.finetuning import run as runs
from qcli.finetuning.trained_linear_8bit import TrainedLinear8bit
from qcli.nn.linear_8bit import Linear8bit
from qcli.ops.dequantize_int8 import dequantize_int8
from tests.finetuning.test_run import Crash, base, contents, data  # noqa: F401
from tests.models import add_tokenizer, make_model

OPTIONS = {"bits": 8, "steps": 6, "batch": 4, "lr": 1e-3, "max_tokens": 64, "device": "cpu"}
SETTINGS = {"train": "weights", "eval_steps": 2}


def trained(base, data, output, **options):  # noqa: F811
    return qcli.finetune(str(base), data, output, **OPTIONS | {"settings": SETTINGS} | options)


@pytest.fixture(scope="module")
def unbroken(base, data, tmp_path_factory):  # noqa: F811
    output = tmp_path_factory.mktemp("unbroken") / "llama-trained"
    return trained(base, data, output), output


def module_and_inputs(dtype, bias=True, outlier=False, out=48, into=32):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(out, into, generator=generator) * 0.1
    b = torch.nn.Parameter(torch.randn(out, generator=generator).to(dtype), requires_grad=False) if bias else None
    x = torch.randn(3, 11, into, generator=generator)
    if outlier:
        x[1, 4, 7] = 30.0
    of_y = torch.randn(3, 11, out, generator=generator)
    return TrainedLinear8bit(weight, b, dtype), x.to(dtype), of_y.to(dtype)


@pytest.mark.parametrize("outlier", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_the_forward_is_that_of_the_stored_codes_to_the_bit(dtype, bias, outlier, tmp_path):
    """The codes are those that `quantize` stores of the weight rounded to the model's dtype."""
    module, x, _ = module_and_inputs(dtype, bias, outlier)
    generator = torch.Generator().manual_seed(6)
    module.weight.data += 1e-3 * torch.randn(module.weight.shape, generator=generator)  # between values of the dtype
    rounded = module.weight.data.to(dtype).float()
    absmax = rounded.abs().amax(1)
    codes = (rounded * (absmax.reciprocal() * 127).unsqueeze(1)).round().to(torch.int8)
    stored = Linear8bit(32, 48, bias, tensors={"weight": codes, "SCB": absmax}, threshold=6.0, dtype=dtype)
    if bias:
        stored.bias.data.copy_(module.bias)
    for inputs in (x, x[:1, :1]):
        with torch.no_grad():
            expected = stored(inputs)
            assert torch.equal(module(inputs), expected)
            assert torch.equal(module.frozen()(inputs), expected)
        assert torch.equal(module(inputs).detach(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_gradients_are_those_of_a_dense_product_straight_through(dtype):
    module, x, of_y = module_and_inputs(dtype)
    x.requires_grad_()
    module(x).backward(of_y)
    dense = dequantize_int8(*module.codes(), torch.float32).double().requires_grad_()
    exact = x.detach().double().requires_grad_()
    linear(exact, dense, module.bias.double()).backward(of_y.double())
    assert module.weight.grad.dtype == torch.float32 and x.grad.dtype == dtype and module.bias.grad is None
    eps = torch.finfo(dtype).eps
    for found, expected in ((module.weight.grad, dense.grad), (x.grad, exact.grad)):
        assert (found.double() - expected).norm() <= 2 * eps * expected.norm()


def test_gradients_of_a_second_pass_add_up_in_float32():
    module, x, of_y = module_and_inputs(torch.bfloat16)
    for scale in (1.0, 2.0**-10):  # below what bfloat16 could add
        module(x).backward(of_y * scale)
    both = module.weight.grad.clone()
    module.weight.grad = None
    module(x).backward(of_y)
    torch.testing.assert_close(both, module.weight.grad * (1 + 2.0**-10), rtol=1e-5, atol=0)


def test_the_held_out_loss_falls_and_the_rest_stays(unbroken, base):  # noqa: F811
    result, output = unbroken
    assert result.after < result.before and result.after == min(loss for _, _, loss in result.losses if loss is not None)
    before, after = load_file(base / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj." in name}
    assert all(before[name].dtype == after[name].dtype and before[name].shape == after[name].shape for name in before)
    assert result.parameters == sum(before[name].numel() for name in changed)
    about = json.loads((output / "qcli.json").read_text())
    assert about["base"]["name"] == str(base) and about["base"]["fingerprint"] and about["best_step"] == result.best
    assert (result.train, result.next) == ("weights", f"qcli quantize {output} --bits 8")
    mask = os.umask(0)
    os.umask(mask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in output.iterdir()} == {0o666 & ~mask}


def test_plain_transformers_loads_it(unbroken, base):  # noqa: F811
    _, output = unbroken
    model, info = transformers.AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.dtype == torch.bfloat16
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    ids = transformers.AutoTokenizer.from_pretrained(output)("3 is red").input_ids
    assert ids == transformers.AutoTokenizer.from_pretrained(base)("3 is red").input_ids


def held_out_loss(plan, model):
    """As training measures it, by the model that qcli has loaded: transformers' own loss, row by row in float64."""
    total = count = 0
    for row in plan.rows.held_out:
        ids, learnt = torch.tensor(row.ids.tolist()), torch.tensor(row.trained.tolist())[1:]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        total, count = total + float(losses[learnt].sum()), count + int(learnt.sum())
    return total / count


@pytest.mark.parametrize("target", ["all-linear", "q_proj,down_proj"])
def test_quantized_it_has_the_loss_that_training_saw(base, data, tmp_path, target):  # noqa: F811
    """With fewer targets the other modules were rounded to int8 in training all the same."""
    plan = verb.planned(str(base), data, tmp_path / "out", **OPTIONS, target=target, settings=SETTINGS)
    result = verb.train(plan)
    qcli.quantize(str(tmp_path / "out"), str(tmp_path / "int8"), bits=8)
    model, _ = qcli.load(str(tmp_path / "int8"), device="cpu")
    assert held_out_loss(plan, model) == pytest.approx(result.after, rel=1e-5)
    original, _ = qcli.load(str(base), device="cpu", bits=8)
    assert held_out_loss(plan, original) == pytest.approx(result.before, rel=1e-5)
    assert result.before - result.after > 0.05


@pytest.mark.parametrize("at", [1, 5])
def test_a_run_that_crashed_goes_on_to_the_same_bytes(unbroken, base, data, tmp_path, monkeypatch, at):  # noqa: F811
    _, expected = unbroken
    output, step = tmp_path / "llama-trained", runs.Run._step

    def crashing(self, number, tokens, advance):
        if number == at:
            raise Crash
        step(self, number, tokens, advance)

    monkeypatch.setattr(runs.Run, "_step", crashing)
    with pytest.raises(Crash):
        trained(base, data, output)
    assert not output.exists()
    monkeypatch.setattr(runs.Run, "_step", step)
    trained(base, data, output)
    assert contents(output) == contents(expected)


def test_ctrl_c_keeps_the_steps_that_are_done(unbroken, base, data, tmp_path, monkeypatch):  # noqa: F811
    output, step = tmp_path / "llama-trained", runs.Run._step

    def interrupted(self, number, tokens, advance):
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        step(self, number, tokens, advance)

    monkeypatch.setattr(runs.Run, "_step", interrupted)
    with pytest.raises(Interrupted, match="interrupted after 3 of 6 steps"):
        trained(base, data, output)
    monkeypatch.setattr(runs.Run, "_step", step)
    trained(base, data, output)
    assert contents(output) == contents(unbroken[1])


def test_a_crash_while_the_model_is_written_leaves_nothing_of_it(unbroken, base, data, tmp_path, monkeypatch):  # noqa: F811
    """Its journal says what is done, of values that may be others the next time."""
    from qcli.finetuning import weights

    output, write = tmp_path / "llama-trained", weights.write_rest

    def crashing(*arguments):
        raise Crash

    monkeypatch.setattr(weights, "write_rest", crashing)
    with pytest.raises(Crash):
        trained(base, data, output)
    staged = output.with_name("llama-trained.partial") / "model.safetensors"
    assert staged.exists() and not output.exists()
    staged.write_bytes(bytes(staged.stat().st_size))
    monkeypatch.setattr(weights, "write_rest", write)
    trained(base, data, output)
    assert contents(output) == contents(unbroken[1])


def test_a_loss_that_is_not_finite_leaves_the_last_good_model(base, data, tmp_path, monkeypatch):  # noqa: F811
    step, kept = runs.Trainer.step, {}

    def broken(self, rows, lr, number):
        if number == 2:
            kept.update({name: parameter.detach().clone() for name, parameter in self.parameters.items()})
            self.model.get_input_embeddings().weight.data[:] = float("nan")
        return step(self, rows, lr, number)

    monkeypatch.setattr(runs.Trainer, "step", broken)
    with pytest.raises(NonFiniteError, match="the model of step 2 is in"):
        trained(base, data, tmp_path / "out", settings=SETTINGS | {"eval_steps": 1})
    tensors = load_file(tmp_path / "out.partial" / "model.safetensors")
    assert all(torch.equal(tensors[name], value.bfloat16()) for name, value in kept.items())


def test_checkpointing_changes_nothing(unbroken, base, data, tmp_path):  # noqa: F811
    trained(base, data, tmp_path / "out", settings=SETTINGS | {"checkpointing": "true"})
    a, b = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", unbroken[1]))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "phi3", "mixtral"])
def test_other_architectures_learn(name, data, tmp_path):  # noqa: F811
    """GPT-2's weights are stored transposed. Gemma's head is the embedding, which stays the one tensor it was."""
    make_model(name, tmp_path / name, torch.bfloat16)
    add_tokenizer(tmp_path / name)
    result = trained(tmp_path / name, data, tmp_path / "out", steps=4)
    assert result.after < result.before
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / name, tmp_path / "out"))
    assert before.keys() == after.keys() and all(before[key].shape == after[key].shape for key in before)
    assert all(torch.equal(before[key], after[key]) for key in before if "embed" in key or "wte" in key or "head" in key)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_the_plan_says_what_is_trained_and_what_it_takes(quick_cli, base, data):  # noqa: F811
    done = quick_cli("finetune", base, data, "--bits", "8", "--set", "train=weights", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "weights: those of 14 modules (down_proj, gate_proj" in done.stdout and "73,728 parameters" in done.stdout
    assert "note: the weights themselves are trained: --rank and --alpha do not count" in done.stdout
    plan = verb.planned(str(base), data, "unused", **OPTIONS, settings=SETTINGS)
    sizes = {part.name: part.bytes for part in plan.memory}
    assert sizes["trained weights"] == sizes["their gradients"] == sizes["AdamW's moments"] // 2 == 4 * 73728
    rest = sum(t.numel() for name, t in load_file(base / "model.safetensors").items() if "_proj." not in name)
    assert sizes["other weights"] == 2 * rest


def test_the_command_says_what_follows(quick_cli, base, data, tmp_path):  # noqa: F811
    shutil.copytree(base, tmp_path / "llama")
    done = quick_cli("finetune", "llama", data, "--bits", "8", "--set", "train=weights", "--steps", "1", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "all else is unchanged" in done.stdout and done.stdout.endswith("next: qcli quantize llama-finetuned --bits 8\n")


def test_wrong_uses_are_refused(base, data, tmp_path):  # noqa: F811
    def refused(words, kind=UsageError, model=base, settings=SETTINGS, **options):
        with pytest.raises(kind, match=words) as error:
            verb.planned(str(model), data, tmp_path / "out", **OPTIONS | options, settings=settings)
        return error.value.hint

    assert refused("train=weights trains weights in the rounding of LLM.int8", bits=None) == "Add --bits 8."
    assert refused("train=weights trains weights in the rounding of LLM.int8", bits=4) == "Add --bits 8."
    refused("train is 'all'", settings={"train": "all"})
    refused("dropout is for adapters", settings=SETTINGS | {"dropout": "0.1"})
    refused("rslora is for adapters", settings=SETTINGS | {"rslora": "true"})
    refused("--target 'x_proj' matches no linear module", target="x_proj")
    qcli.quantize(str(base), str(tmp_path / "int8"), bits=8)
    for bits in (8, None):
        hint = refused("is quantized, and train=weights needs", CheckpointError, tmp_path / "int8", bits=bits)
        assert "Give the unquantized model" in hint
