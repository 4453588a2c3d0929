"""`qcli merge`: exact weights, plain checkpoints that transformers loads, bases of every kind, and what is refused."""

import json
import os
import shutil
import stat
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import qcli
from qcli.checkpoint.source import open_source
from qcli.errors import CheckpointError, NonFiniteError, QcliError, QcliWarning, UsageError
from qcli.quantization import adapter_base, merging
from qcli.quantization import merge as verb
from qcli.recipe import Choice, Recipe
from tests.adapters import change_config, change_tensors, make_adapter
from tests.conftest import ROOT
from tests.hub_server import COMMIT, running_hub
from tests.models import add_tokenizer, example_inputs, make_model, make_tied

DEMO, STORIES = ROOT / "examples/demo-model", ROOT / "examples/stories.jsonl"


def trained(folder, base, **config):
    """An adapter on the plain model `folder/model`, whose config and qcli.json name the folder `base` beside it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    made = make_adapter(model, folder / "adapter", **config)
    change_config(folder / "adapter", base_model_name_or_path=str(folder / base))
    stated = {"name": base, "revision": None, "fingerprint": open_source(str(folder / base)).fingerprint}
    (folder / "adapter/qcli.json").write_text(json.dumps({"qcli": "0", "base": stated}))
    return made


def changes(folder, scaling: float = 2.0) -> dict[str, torch.Tensor]:
    """scaling B A of each module in float64, by the name of its weight."""
    stored = {
        name.removeprefix("base_model.model."): t.double() for name, t in load_file(folder / "adapter_model.safetensors").items()
    }
    modules = {name.partition(".lora_")[0] for name in stored}
    return {f"{m}.weight": scaling * stored[f"{m}.lora_B.weight"] @ stored[f"{m}.lora_A.weight"] for m in modules}


def is_rounding_of(found: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether each element is the nearest of its dtype to float64 values, or where these are halfway within 2^-20 the other."""
    nearest = exact.to(found.dtype).double()
    slack = 2.0**-20 * exact.abs().clamp_min(exact.abs().mean())
    return bool(((found.double() - exact).abs() <= (nearest - exact).abs() + slack).all())


@pytest.mark.parametrize(
    "name, options, config",
    [
        ("llama", None, {}),
        ("gpt2", None, {"fan_in_fan_out": True}),
        ("llama", {"bits": 4}, {}),
        ("gpt2", {"bits": 8}, {"fan_in_fan_out": True}),
        ("qwen2", {"method": "rtn", "group_size": 32, "format": "gptq"}, {"target_modules": ["q_proj", "down_proj"]}),
        ("llama", {"bits": 4, "head": 8}, {}),
        ("mixtral", {"bits": 4}, {"target_modules": ["q_proj", "o_proj"]}),
    ],
    ids=str,
)
def test_weights_are_sums_rounded_once(name, options, config, tmp_path):
    (make_tied if options and "head" in options else make_model)(name, tmp_path / "model")
    base, plain = "model", "model"
    if options:
        qcli.quantize(str(tmp_path / "model"), tmp_path / "base", device="cpu", **options)
        qcli.dequantize(str(tmp_path / "base"), tmp_path / "plain", dtype="float32")
        base, plain = "base", "plain"
    trained(tmp_path, base, **config)
    made = qcli.merge(str(tmp_path / "adapter"), tmp_path / "out")
    assert made.onto == ("quantized" if options else "original") and made.dtype == "bfloat16"
    before, after = load_file(tmp_path / plain / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    added = changes(tmp_path / "adapter")
    assert before.keys() == after.keys() and made.modules == len(added)
    squares = [0.0, 0.0]
    for key, tensor in after.items():
        delta = added.pop(key, added.pop(f"transformer.{key}", None)) if name == "gpt2" else added.pop(key, None)
        if delta is None:
            assert torch.equal(tensor, before[key].to(tensor.dtype)), key
            continue
        delta = delta.t() if name == "gpt2" else delta
        assert tensor.dtype == torch.bfloat16 and is_rounding_of(tensor, before[key].double() + delta), key
        squares = [squares[0] + delta.square().sum().item(), squares[1] + before[key].double().square().sum().item()]
    assert not added
    assert made.relative_change == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-4)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_transformers_runs_what_the_adapter_made(name, tmp_path):
    make_model(name, tmp_path / "model", torch.float32)
    theirs = trained(tmp_path, "model", fan_in_fan_out=name == "gpt2")
    qcli.merge(str(tmp_path / "adapter"), tmp_path / "out")
    plain, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert plain.dtype == torch.float32 and not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(
            plain(**example_inputs(plain)).logits, theirs(**example_inputs(plain)).logits, rtol=1e-4, atol=1e-5
        )


def test_nothing_is_lost_on_a_quantized_base(tmp_path):
    """Logits of NF4 with its adapter, by PEFT on the decoded base, and of the merged model in float32."""
    make_model("llama", tmp_path / "model", torch.float32)
    qcli.quantize(str(tmp_path / "model"), tmp_path / "base", bits=4, dtype="float32")
    qcli.dequantize(str(tmp_path / "base"), tmp_path / "plain")
    trained(tmp_path, "base")
    qcli.merge(str(tmp_path / "adapter"), tmp_path / "out")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    decoded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    theirs = peft.PeftModel.from_pretrained(decoded, tmp_path / "adapter")
    with torch.no_grad():
        inputs = example_inputs(merged)
        torch.testing.assert_close(merged(**inputs).logits, theirs(**inputs).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [None, {"bits": 4, "head": 4}], ids=str)
def test_a_tied_head_with_an_adapter_is_untied(options, tmp_path):
    """The embedding stays what it is; the head becomes a weight of its own."""
    make_tied("llama", tmp_path / "model", torch.float32)
    base = "model"
    if options:
        qcli.quantize(str(tmp_path / "model"), tmp_path / "base", dtype="float32", **options)
        base = "base"
    trained(tmp_path, base, target_modules=["lm_head", "q_proj"])
    qcli.merge(str(tmp_path / "adapter"), tmp_path / "out")
    adapted, _ = qcli.load(str(tmp_path / base), adapter=str(tmp_path / "adapter"), device="cpu")
    merged, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert (
        not info["missing_keys"] and not info["unexpected_keys"] and merged.lm_head.weight is not merged.model.embed_tokens.weight
    )
    with torch.no_grad():
        inputs = example_inputs(merged)
        bound = {"rtol": 0.05, "atol": 0.05} if options else {"rtol": 1e-4, "atol": 1e-5}  # kernels compute in bfloat16
        torch.testing.assert_close(merged(**inputs).logits, adapted(**inputs).logits, **bound)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_onto_the_original(tmp_path):
    make_model("llama", tmp_path / "model")
    qcli.quantize(str(tmp_path / "model"), tmp_path / "base", bits=4)
    trained(tmp_path, "base")
    made = qcli.merge(str(tmp_path / "adapter"), tmp_path / "out", onto="original")
    assert made.onto == "original" and made.base == str(tmp_path / "model")
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("model", "out"))
    for key, delta in changes(tmp_path / "adapter").items():
        assert is_rounding_of(after[key], before[key].double() + delta)
    shutil.move(tmp_path / "model", tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="was made from the folder model, and there is none of that name beside it"):
        qcli.merge(str(tmp_path / "adapter"), tmp_path / "other", onto="original")
    with pytest.warns(QcliWarning, match="elsewhere is another checkpoint"):
        again = qcli.merge(str(tmp_path / "adapter"), tmp_path / "other", base=str(tmp_path / "elsewhere"))
    assert again.onto == "original"
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "other/model.safetensors").read_bytes()
    make_model("llama", tmp_path / "model", torch.float16)
    with pytest.raises(CheckpointError, match="is not the checkpoint that .*base was made from"):
        qcli.merge(str(tmp_path / "adapter"), tmp_path / "third", onto="original")


def test_a_base_that_was_quantized_while_it_was_read(tmp_path, monkeypatch):
    """The same bytes as for the same base quantized beforehand; also where an earlier run was stopped behind that."""
    make_model("llama", tmp_path / "model")
    qcli.quantize(str(tmp_path / "model"), tmp_path / "base", bits=4)
    trained(tmp_path, "base")
    qcli.merge(str(tmp_path / "adapter"), tmp_path / "expected")
    trained(tmp_path, "model")
    stated = json.loads((tmp_path / "adapter/qcli.json").read_text())
    read = Recipe(Choice("nf4")).summary()
    (tmp_path / "adapter/qcli.json").write_text(json.dumps(stated | {"quantized_as_read": read}))
    run = verb.execute
    monkeypatch.setattr(verb, "execute", None)
    with pytest.raises(TypeError):
        qcli.merge(str(tmp_path / "adapter"), tmp_path / "out")
    assert (tmp_path / ".out.base/config.json").exists()
    monkeypatch.setattr(verb, "execute", run)
    monkeypatch.setattr(adapter_base, "run_plan", None)
    made = qcli.merge(str(tmp_path / "adapter"), tmp_path / "out")
    assert made.onto == "quantized" and made.base == str(tmp_path / "model") and not (tmp_path / ".out.base").exists()
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "expected/model.safetensors").read_bytes()
    about = json.loads((tmp_path / "out/qcli.json").read_text())
    assert about["quantized_as_read"] == read and about["source"]["name"] == "model"
    plain = qcli.merge(str(tmp_path / "adapter"), tmp_path / "plain", onto="original")
    assert plain.onto == "original"
    assert (tmp_path / "out/model.safetensors").read_bytes() != (tmp_path / "plain/model.safetensors").read_bytes()
    with pytest.warns(QcliWarning, match="was trained on .*model quantized to nf4, and it is read as it is stored"):
        qcli.load(str(tmp_path / "model"), adapter=str(tmp_path / "adapter"), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error", QcliWarning)
        qcli.load(str(tmp_path / "model"), adapter=str(tmp_path / "adapter"), device="cpu", bits=4)
    with pytest.warns(QcliWarning, match="quantized to nf4, and it is read quantized to nf4 by other options"):
        qcli.load(str(tmp_path / "model"), adapter=str(tmp_path / "adapter"), device="cpu", bits=4, block_size=128)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_afterwards(bits, tmp_path):
    make_model("llama", tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    trained(tmp_path, "model")
    made = qcli.merge(str(tmp_path / "adapter"), tmp_path / "out", bits=bits)
    qcli.merge(str(tmp_path / "adapter"), tmp_path / "plain")
    qcli.quantize(str(tmp_path / "plain"), tmp_path / "expected", bits=bits)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    assert (
        made.dtype == {8: "llm-int8", 4: "nf4"}[bits] and made.output_bytes == (tmp_path / "out/model.safetensors").stat().st_size
    )
    assert not list(tmp_path.glob(".out*")) and not list(tmp_path.glob("out.*"))
    assert json.loads((tmp_path / "out/qcli.json").read_text())["source"]["name"] == "model-adapter"


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    make_model("llama", tmp_path / "model")
    qcli.quantize(str(tmp_path / "model"), tmp_path / "base", bits=4)
    trained(tmp_path, "base")
    whole = qcli.merge(str(tmp_path / "adapter"), tmp_path / "whole")
    add, count = merging.add, 0

    def stops(*arguments):
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        return add(*arguments)

    monkeypatch.setattr(merging, "add", stops)
    with pytest.raises(KeyboardInterrupt):
        qcli.merge(str(tmp_path / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    again = qcli.merge(str(tmp_path / "adapter"), tmp_path / "out")
    assert count < 6 + 14 and again.relative_change == whole.relative_change
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_a_run_that_was_stopped_while_it_quantized_goes_on(tmp_path, monkeypatch):
    """With the same adapter it merges nothing again. With another one, of the same shapes, nothing of the first is left."""
    make_model("llama", tmp_path / "model")
    trained(tmp_path, "model")
    expected = qcli.merge(str(tmp_path / "adapter"), tmp_path / "expected", bits=4)
    run, add = verb.run_plan, merging.add

    def stopped(plan, **options):
        from qcli.quantization.staging import Staging

        with Staging(plan):  # as much as a kill leaves at least
            raise KeyboardInterrupt

    monkeypatch.setattr(verb, "run_plan", stopped)
    with pytest.raises(KeyboardInterrupt):
        qcli.merge(str(tmp_path / "adapter"), tmp_path / "out", bits=4)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    monkeypatch.setattr(verb, "run_plan", run)
    monkeypatch.setattr(merging, "add", None)
    again = qcli.merge(str(tmp_path / "adapter"), tmp_path / "out", bits=4)
    assert again.relative_change == expected.relative_change
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "expected/model.safetensors").read_bytes()
    monkeypatch.setattr(merging, "add", add)
    monkeypatch.setattr(verb, "run_plan", stopped)
    with pytest.raises(KeyboardInterrupt):
        qcli.merge(str(tmp_path / "adapter"), tmp_path / "second", bits=4)
    (tmp_path / "second.partial/left").write_text("of the first")
    change_tensors(tmp_path / "adapter", lambda tensors: {name: -2 * tensor for name, tensor in tensors.items()})
    monkeypatch.setattr(verb, "run_plan", run)
    other = qcli.merge(str(tmp_path / "adapter"), tmp_path / "second", bits=4)
    assert other.relative_change > 2 * expected.relative_change and not (tmp_path / "second/left").exists()


def test_what_goes_along(tmp_path):
    make_model("llama", tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text("of the base")
    (tmp_path / "model/tokenizer.model").write_text("of the base")
    trained(tmp_path, "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = "of the adapter"
    tokenizer.save_pretrained(tmp_path / "adapter")
    before = os.umask(0o027)
    try:
        qcli.merge(str(tmp_path / "adapter"), tmp_path / "out")
    finally:
        os.umask(before)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == "of the adapter" and (tmp_path / "out/tokenizer.model").read_text() == "of the base"
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o640}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "adapter_config.json" not in names and "adapter_model.safetensors" not in names
    made = json.loads((tmp_path / "out/qcli.json").read_text())
    assert made["adapter"]["name"] == "adapter" and made["source"]["name"] == "model" and made["merged_modules"] == 14


def test_the_losses_of_a_text(tmp_path, quick_cli):
    shutil.copytree(DEMO, tmp_path / "model")
    qcli.quantize(str(tmp_path / "model"), tmp_path / "base", bits=4)
    trained(tmp_path, "base")
    arguments = ("merge", "adapter", "-o", "out", "--text", STORIES)
    done = quick_cli(*arguments, "--json")
    found = json.loads(done.stdout)
    assert found["losses"]["merged"] == pytest.approx(found["losses"]["adapter"], rel=0.01)
    expected = qcli.evaluate(str(tmp_path / "out"), text=STORIES).rows[0].quality.loss.value
    assert found["losses"]["merged"] == pytest.approx(expected, rel=1e-6)
    plain = qcli.evaluate(str(tmp_path / "base"), text=STORIES).rows[0].quality.loss.value
    assert abs(found["losses"]["adapter"] - plain) > 0.1
    done = quick_cli(*arguments, "--overwrite")
    assert "42 modules of" in done.stdout and "of the base with the adapter" in done.stdout


# What is refused


@pytest.fixture
def made(tmp_path):
    make_model("llama", tmp_path / "model")
    trained(tmp_path, "model")
    return tmp_path


def test_the_base(made):
    adapter = str(made / "adapter")
    change_config(made / "adapter", base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match="names no base model"):
        qcli.merge(adapter, made / "out")
    change_config(made / "adapter", base_model_name_or_path="models/of/another/machine")
    with pytest.raises(CheckpointError, match="models/of/another/machine, cannot be opened: there is no folder") as raised:
        qcli.merge(adapter, made / "out")
    assert "--base MODEL" in raised.value.hint
    change_config(made / "adapter", base_model_name_or_path=str(made / "model"))
    make_model("llama", made / "model", torch.float16)
    with pytest.raises(CheckpointError, match="was trained on model .* is another checkpoint"):
        qcli.merge(adapter, made / "out")
    with pytest.warns(QcliWarning, match="is another checkpoint"):
        qcli.merge(adapter, made / "out", base=str(made / "model"))
    with pytest.raises(CheckpointError, match="exists already"):
        qcli.merge(adapter, made / "out")


def test_what_does_not_fit(made):
    make_model("gpt2", made / "other")
    with pytest.warns(QcliWarning), pytest.raises(CheckpointError, match="14 modules that are no linear modules of the model"):
        qcli.merge(str(made / "adapter"), made / "out", base=str(made / "other"))
    change_tensors(made / "adapter", lambda tensors: {name: 1e30 * tensor for name, tensor in tensors.items()})
    with pytest.raises(NonFiniteError, match="the merged weight has values that bfloat16 cannot hold"):
        qcli.merge(str(made / "adapter"), made / "out")
    change_tensors(made / "adapter", lambda tensors: {name: torch.nan * tensor for name, tensor in tensors.items()})
    with pytest.raises(QcliError, match="holds NaN or infinity"):
        qcli.merge(str(made / "adapter"), made / "third")
    assert not (made / "out").exists() and not (made / "third").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bits": 5}, "bits is 5, expected one of 16, 8, 4"),
        ({"onto": "both"}, "onto is 'both', expected one of quantized, original"),
        ({"text": "nowhere.txt"}, "there is no file nowhere.txt"),
    ],
)
def test_options(options, message, made):
    with pytest.raises(UsageError, match=message):
        qcli.merge(str(made / "adapter"), made / "out", **options)


def test_base_and_adapter_on_the_hub(tmp_path, monkeypatch):
    """Both by their ids, also from the cache alone; with the tokenizer and the template of the adapter."""
    make_model("llama", tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    trained(tmp_path, "model")
    change_config(tmp_path / "adapter", base_model_name_or_path="org/base", revision=COMMIT)
    (tmp_path / "adapter/qcli.json").unlink()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = "of the adapter"
    tokenizer.save_pretrained(tmp_path / "adapter")
    with running_hub() as hub:
        hub.add_repo("org/base", tmp_path / "model")
        hub.add_repo("org/adapter", tmp_path / "adapter")
        hub.serve_this_process(monkeypatch, tmp_path / "home")
        made = qcli.merge("org/adapter", tmp_path / "out")
        _, found = qcli.load("org/base", adapter="org/adapter", device="cpu")
    assert made.base == "org/base" and found.chat_template == "of the adapter"
    about = json.loads((tmp_path / "out/qcli.json").read_text())
    assert about["adapter"]["name"] == "org/adapter" and about["adapter"]["revision"] == about["source"]["revision"] == COMMIT
    assert (tmp_path / "out/chat_template.jinja").read_text() == "of the adapter"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    again = qcli.merge("org/adapter", tmp_path / "again")
    assert again.modules == made.modules == 14
