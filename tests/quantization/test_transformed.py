"""Methods that change the inputs of modules, from end to end: what they gain, what others load, and that nothing but the input
decides their bytes."""

import hashlib
import multiprocessing
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import qcli
from qcli.errors import UsageError
from qcli.quantization import shard_files, staging
from qcli.quantization.quantize import make_plan
from qcli.schemes import chosen
from tests.models import add_tokenizer, example_inputs, make_model

STORY = "Once upon a time there was a little dog. He liked to run in the park with his friend. One day he found a red ball. "
AWQ = {"method": "awq", "group_size": 32}
SMOOTH = {"method": "smoothquant"}
BOTH = [AWQ, SMOOTH]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of some 5,000 bytes that differ."""
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text("".join(f"{i} {STORY[i % 60 :]}" for i in range(60)))
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "model"
    plant(make_model("llama", folder), folder)
    add_tokenizer(folder)
    return folder


def plant(model, folder) -> None:
    """Multiplies four channels of each norm by 40, and divides the columns that read them: the same model, with outliers."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight.data[3::16] *= 40
            for reader in readers:
                reader.weight.data[:, 3::16] /= 40
    model.save_pretrained(folder)


def digest(folder) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "options, most",
    [
        (SMOOTH, 0.2),
        (SMOOTH | {"calibrate": True}, 0.2),
        ({"method": "int8", "calibrate": True}, 0.2),
        (AWQ, 0.9),
        (AWQ | {"calibrate": True}, 0.5),
    ],
)
def test_what_it_gains_on_planted_outliers(options, most, llama, tmp_path, text):
    """KL divergence on held-out text beside plain rounding to the same scheme, with activations rounded where readers do."""
    found = qcli.quantize(str(llama), tmp_path / "out", text=text, **options).calibration
    assert found.checked.kl < most * found.checked.plain_kl
    assert all(kind.relative_error < kind.plain_relative_error for kind in found.kinds if kind.name not in ("o_proj", "down_proj"))
    (note,) = found.notes  # grouped heads: rows of v_proj stand for several columns of o_proj
    assert "not transformed" in note and "layers.0.self_attn.o_proj" in note and "down_proj" not in note


def test_the_error_without_texts_is_that_of_the_unchanged_weight(llama, tmp_path, text):
    """It is the same whatever is done beside it: int8 to nearest, of the weight and the input as they were."""
    found = [
        qcli.quantize(str(llama), tmp_path / str(number), text=text, tokens=2000, **options).calibration.kinds
        for number, options in enumerate((SMOOTH, SMOOTH | {"calibrate": True}))
    ]
    for nearest, gptq in zip(*found):
        assert gptq.plain_relative_error == pytest.approx(nearest.plain_relative_error, rel=0.05)
        assert gptq.relative_error < 1.02 * nearest.relative_error


def test_int8_with_texts_is_smoothquant_and_gptq(llama, tmp_path, text):
    plan = make_plan(str(llama), tmp_path / "out", method="int8", calibrate=True, text=text)
    (method,) = {work.method for work in plan.quantized}
    assert (method.scheme.name, method.rounding) == ("smoothquant", "gptq")
    plan = make_plan(str(llama), tmp_path / "out", method="int8")
    assert plan.method_name == "int8" and plan.calibration is None
    plan = make_plan(str(llama), tmp_path / "out", method="smoothquant")
    assert plan.calibration is not None and plan.method.rounding == "nearest"


def test_formats(llama, tmp_path):
    assert make_plan(str(llama), tmp_path / "out", method="awq", group_size=32).format.name == "awq"
    plan = make_plan(str(llama), tmp_path / "out", method="awq", group_size=32, format="compressed-tensors")
    assert plan.format.name == "compressed-tensors"
    assert make_plan(str(llama), tmp_path / "out", method="smoothquant").format.name == "compressed-tensors"


@pytest.mark.parametrize("options", [SMOOTH, AWQ | {"format": "compressed-tensors"}])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3_text", "phi3", "opt", "mixtral"])
def test_architectures(name, options, tmp_path, text):
    """The folder is an ordinary checkpoint: compressed-tensors decodes what qcli decodes, norms and biases among it, and the model
    is that of the source but for rounding."""
    source = make_model(name, tmp_path / "model").float()
    add_tokenizer(tmp_path / "model")
    report = qcli.quantize(str(tmp_path / "model"), tmp_path / "out", text=text, tokens=1500, **options)
    assert report.calibration.modules == report.quantized_modules
    qcli.dequantize(str(tmp_path / "out"), tmp_path / "plain", dtype="float32")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    inputs = example_inputs(source)
    with torch.inference_mode():
        wanted, found = source(**inputs).logits, ours(**inputs).logits
    noise = float((found - wanted).square().sum() / (wanted - wanted.mean()).square().sum())
    assert noise < (0.001 if options is SMOOTH else 0.1)
    before, after = dict(source.named_parameters()), dict(ours.named_parameters())
    assert any(p.dim() == 1 and not torch.equal(p, after[path]) for path, p in before.items())
    if name == "mixtral":  # whose experts compressed-tensors 0.17 cannot put together when others are quantized
        return
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.bfloat16
    )
    for path, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameter.float(), after[path], rtol=2**-7, atol=1e-6)


def test_awqs_format_holds_the_same_values(llama, tmp_path, text):
    """The words of AWQ's format and those of compressed-tensors, of one search."""
    found = []
    for format in ("awq", "compressed-tensors"):
        qcli.quantize(str(llama), tmp_path / format, text=text, tokens=1500, format=format, **AWQ)
        qcli.dequantize(str(tmp_path / format), tmp_path / f"{format}-plain", dtype="float32")
        found.append(load_file(tmp_path / f"{format}-plain" / "model.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize("options", BOTH)
def test_threads_do_not_matter(options, llama, tmp_path, text):
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            qcli.quantize(str(llama), tmp_path / f"out{threads}", text=text, tokens=2000, calibrate=True, **options)
    finally:
        torch.set_num_threads(before)
    assert digest(tmp_path / "out1") == digest(tmp_path / "out3")


def killed(folder, text, after, options):
    """In a process of its own: calibrates, and kills itself once so many units are journalled."""
    os.chdir(folder)
    shard_files.SYNC_SECONDS = 0
    finish = staging.Staging.finish_work

    def finish_work(self, index, errors):
        finish(self, index, errors)
        if len(self.done) >= after:
            os.kill(os.getpid(), signal.SIGKILL)

    staging.Staging.finish_work = finish_work
    qcli.quantize("model", "out", text=text, tokens=2000, **options)


@pytest.mark.parametrize(
    "after",
    [
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(2, marks=pytest.mark.slow),
        5,
        pytest.param(9, marks=pytest.mark.slow),
        pytest.param(11, marks=pytest.mark.slow),
        14,
        pytest.param(18, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("options", BOTH)
def test_kill_and_rerun(options, after, llama, tmp_path, text, monkeypatch):
    """After a norm alone, within a block, between blocks, and at the end."""
    qcli.quantize(str(llama), tmp_path / "whole", text=text, tokens=2000, **options)
    (tmp_path / "model").symlink_to(llama)
    process = multiprocessing.get_context("spawn").Process(target=killed, args=(tmp_path, text, after, options))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "out").exists()
    monkeypatch.chdir(tmp_path)
    qcli.quantize("model", "out", text=text, tokens=2000, **options)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_readers_of_one_input_with_other_methods_forbid_factors(llama, tmp_path, text):
    """q, k and v read one norm, and v has no factors: the norm is carried over as it is. gate and up are transformed."""
    from qcli.recipe import Choice, Recipe

    rules = (("*.v_proj", Choice("rtn", (("bits", 8), ("group_size", 32)))),)
    recipe = Recipe(Choice("awq", (("group_size", 32),)), rules, format="compressed-tensors")
    found = qcli.quantize(str(llama), tmp_path / "out", recipe=recipe, text=text, tokens=2000).calibration
    (note,) = found.notes
    assert "self_attn.q_proj" in note and "mlp.gate_proj" not in note
    stored, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", llama))
    for layer in range(2):
        norm = f"model.layers.{layer}.{{}}layernorm.weight"
        assert torch.equal(stored[norm.format("input_")], before[norm.format("input_")])
        assert not torch.equal(stored[norm.format("post_attention_")], before[norm.format("post_attention_")])


def test_what_only_texts_make_is_not_simulated():
    for name in ("awq", "smoothquant"):
        with pytest.raises(UsageError, match=f"{name} is .* after a change that texts decide"):
            chosen(f"nf4,{name}")
    assert {"awq", "smoothquant"}.isdisjoint(scheme.name for scheme in chosen("all"))
