"""LoRA adapters on models of any kind against PEFT, the lean step with them, and what is refused."""

import json
import shutil
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import qcli
from qcli.checkpoint.source import open_source
from qcli.errors import QcliError, QcliWarning
from qcli.generation import decode
from qcli.generation.op_step import OpStep
from qcli.generation.sampling import Sampling
from qcli.loading.adapter import open_adapter
from qcli.nn.low_rank import added_to
from qcli.runtime import cpu
from tests.adapters import change_config, change_tensors, make_adapter
from tests.conftest import ROOT
from tests.models import add_tokenizer, example_inputs, make_model, make_tied

DEMO = ROOT / "examples/demo-model"

CASES = {
    "llama": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True, "r": 6}),
    "patterns": (
        "qwen2",
        {"rank_pattern": {"mlp.*": 2, "^model.layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"o_proj": 5}, "use_rslora": True},
    ),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "tied head": ("gemma2", {"target_modules": ["lm_head", "down_proj"]}),
    "conv1d": ("gpt2", {"fan_in_fan_out": True}),
    "some": ("gpt_neox", {"target_modules": ["query_key_value"]}),
}


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings")
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(case, tmp_path):
    name, config = CASES[case]
    make_adapter(make_model(name, tmp_path / "model", torch.float32), tmp_path / "adapter", **config)
    if case == "rslora":  # stored in 16 bits, as some tools do
        change_tensors(tmp_path / "adapter", lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    ours, _ = qcli.load(str(tmp_path / "model"), adapter=str(tmp_path / "adapter"), device="cpu")
    plain, _ = qcli.load(str(tmp_path / "model"), device="cpu")
    inputs = example_inputs(ours)
    with torch.no_grad():
        expected = theirs(**inputs).logits
        torch.testing.assert_close(ours(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
        assert (plain(**inputs).logits - expected).abs().max() > 0.05


def test_every_architecture_has_its_modules(tmp_path):
    """What PEFT takes for all linear modules, we find under the same names."""
    for name in ("phi3", "opt", "bloom", "gptj", "mixtral", "cohere"):
        model = make_model(name, tmp_path / name, torch.float32)
        targets = ["q_proj", "v_proj"] if name == "mixtral" else "all-linear"  # PEFT takes its experts for parameters
        expected = make_adapter(model, tmp_path / "adapter", target_modules=targets)
        ours, _ = qcli.load(str(tmp_path / name), adapter=str(tmp_path / "adapter"), device="cpu")
        count = sum(added_to(module) is not None for module in ours.modules())
        assert count == len(load_file(tmp_path / "adapter/adapter_model.safetensors")) // 2 > 3
        inputs = example_inputs(ours)
        with torch.no_grad():
            torch.testing.assert_close(ours(**inputs).logits, expected(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options, dtype",
    [
        ({"bits": 4}, "float32"),
        ({"bits": 8}, "bfloat16"),
        ({"method": "rtn", "group_size": 32}, "float32"),
        ({"method": "nf3"}, "bfloat16"),
        ({"bits": 4, "head": 8}, "float32"),
    ],
    ids=str,
)
def test_quantized_modules_add_the_product(options, dtype, tmp_path):
    model = make_tied("llama", tmp_path / "model")
    make_adapter(model, tmp_path / "adapter", target_modules=["q_proj", "down_proj", "lm_head"])
    load = {"device": "cpu", "dtype": dtype, **options}
    plain, _ = qcli.load(str(tmp_path / "model"), **load)
    adapted, _ = qcli.load(str(tmp_path / "model"), adapter=str(tmp_path / "adapter"), **load)
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    with torch.no_grad():
        for name in ("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj", "lm_head"):
            module, a, b = (
                plain.get_submodule(name),
                *(stored[f"base_model.model.{name}.lora_{half}.weight"].double() for half in "AB"),
            )
            given = x[..., : a.shape[1]].contiguous()
            expected = module(given).double() + 2 * given.double() @ a.t() @ b.t()
            found = adapted.get_submodule(name)(given)
            assert found.dtype == given.dtype
            bound = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.01, "atol": 0.02}
            torch.testing.assert_close(found.double(), expected, **bound)


def generated(folder, adapter, monkeypatch, step: str, **options):
    monkeypatch.setenv("QCLI_STEP", "transformers" if step == "transformers" else "lean")
    model, tokenizer = qcli.load(str(folder), adapter=adapter and str(adapter), device="cpu", **options)
    made = decode.generate(model, tokenizer, list(range(5, 18)), Sampling(40, temperature=0), lambda token: None)
    assert made.step == step
    return made.token_ids


@pytest.mark.skipif(not cpu.variants(), reason="there is no kernel")
@pytest.mark.parametrize(
    "name, options, config",
    [
        ("llama", {}, {}),
        ("llama", {"bits": 4}, {}),
        ("qwen2", {"bits": 8, "int8_activations": False}, {"target_modules": ["lm_head", "v_proj", "up_proj"]}),
        ("gpt2", {}, {"fan_in_fan_out": True}),
        ("phi3", {"bits": 4}, {"r": 1}),
    ],
    ids=str,
)
def test_the_lean_step_runs_with_the_adapter(name, options, config, tmp_path, monkeypatch):
    make_adapter(make_model(name, tmp_path / "model", torch.float32), tmp_path / "adapter", **config)
    add_tokenizer(tmp_path / "model")
    options = {"dtype": "float32", **options}
    expected = generated(tmp_path / "model", tmp_path / "adapter", monkeypatch, "transformers", **options)
    assert generated(tmp_path / "model", tmp_path / "adapter", monkeypatch, "lean", **options) == expected
    assert generated(tmp_path / "model", None, monkeypatch, "lean", **options) != expected


def test_the_step_of_ops_runs_with_the_adapter(tmp_path):
    make_adapter(make_model("llama", tmp_path / "model", torch.float32), tmp_path / "adapter")
    ours, _ = qcli.load(str(tmp_path / "model"), adapter=str(tmp_path / "adapter"), device="cpu", bits=4)
    step, ids = OpStep(ours), torch.tensor([[7, 3, 90]])
    caches = step.caches(8, step.dtype)
    with torch.inference_mode():
        step.read(ids[:, :2], caches)
        for layer in caches.layers:
            layer.keys, layer.values = layer.keys[None], layer.values[None]
        logits = step.logits(ids[0, 2:], torch.tensor(2), caches.layers, step.laid_out(8))
        torch.testing.assert_close(logits, ours(ids).logits[:, -1], rtol=1e-3, atol=1e-3)


def test_a_foreign_hook_beside_it_is_respected(tmp_path):
    make_adapter(make_model("llama", tmp_path / "model", torch.float32), tmp_path / "adapter")
    ours, _ = qcli.load(str(tmp_path / "model"), adapter=str(tmp_path / "adapter"), device="cpu")
    assert decode.lean_of(ours) is not None or not cpu.variants()
    ours.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, inputs, output: output * 2)
    assert decode.lean_of(ours) is None


def test_gradients_pass(tmp_path):
    """What is added is differentiable with respect to the input, also after inference."""
    model = make_model("llama", tmp_path / "model", torch.float32)
    theirs = make_adapter(model, tmp_path / "adapter")
    ours, _ = qcli.load(str(tmp_path / "model"), adapter=str(tmp_path / "adapter"), device="cpu")
    ids = torch.arange(1, 9)[None]
    with torch.inference_mode():
        ours(ids)
    gradients = []
    for each, embedding in ((ours, ours.get_input_embeddings()), (theirs, theirs.get_input_embeddings())):
        x = embedding(ids).detach().requires_grad_()
        each(inputs_embeds=x).logits.square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


# What an adapter brings along


def test_its_tokenizer_and_template_are_taken(tmp_path):
    make_adapter(make_model("llama", tmp_path / "model", torch.float32), tmp_path / "adapter")
    add_tokenizer(tmp_path / "model")
    plain, base = qcli.load(str(tmp_path / "model"), device="cpu")
    assert qcli.load(str(tmp_path / "model"), adapter=str(tmp_path / "adapter"), device="cpu")[1].chat_template is None
    base.chat_template = "{{ messages[0].content }}"
    base.save_pretrained(tmp_path / "adapter")
    _, found = qcli.load(str(tmp_path / "model"), adapter=str(tmp_path / "adapter"), device="cpu")
    assert found.chat_template == base.chat_template


def test_another_base_is_warned_of(tmp_path):
    make_adapter(make_model("llama", tmp_path / "model", torch.float32), tmp_path / "adapter")
    fingerprint = open_source(str(tmp_path / "model")).fingerprint
    base = {"name": "org/base", "revision": None, "fingerprint": fingerprint}
    (tmp_path / "adapter/qcli.json").write_text(json.dumps({"qcli": "0.1", "base": base}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", QcliWarning)
        qcli.load(str(tmp_path / "model"), adapter=str(tmp_path / "adapter"), device="cpu")
    (tmp_path / "adapter/qcli.json").write_text(json.dumps({"qcli": "0.1", "base": base | {"fingerprint": "0" * 64}}))
    with pytest.warns(QcliWarning, match="adapter was trained on org/base \\(000000000000\\), and .*model is another checkpoint"):
        qcli.load(str(tmp_path / "model"), adapter=str(tmp_path / "adapter"), device="cpu")


# What is refused


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    make_adapter(make_model("llama", folder / "model", torch.float32), folder / "adapter")
    return folder


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


REFUSED = {
    "dora": ({"use_dora": True}, None, "has DoRA \\(use_dora"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, None, "whole modules beside the matrices \\(modules_to_save"),
    "biases": ({"bias": "all"}, None, "trained biases \\(bias all"),
    "lora_bias": ({"lora_bias": True}, None, "biases of its own"),
    "tokens": ({"trainable_token_indices": [1]}, None, "rows of an embedding"),
    "parameters": ({"target_parameters": ["experts"]}, None, "parameters that are no linear modules"),
    "layers": ({"layer_replication": [[0, 1], [0, 1]]}, None, "layers that occur several times"),
    "kind": ({"peft_type": "IA3"}, None, "an adapter of the kind IA3"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, None, "begins with pissa_niter_4"),
    "rank": ({"r": "4"}, None, 'r is "4" \\(a string\\), expected a whole number'),
    "alpha": ({"lora_alpha": None}, None, "has no lora_alpha"),
    "pattern": ({"rank_pattern": {"(": 2}}, None, "which is no regular expression"),
    "another rank": ({"r": 5}, None, "lora_A.weight has shape \\[4, 128\\], expected \\[5, in_features\\]"),
    "no half": ({}, without(FIRST.format("B")), "down_proj has no lora_B.weight"),
    "nothing": ({}, lambda tensors: {}, "holds no tensors"),
    "embedding": (
        {},
        lambda tensors: tensors | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 64)},
        "lora_embedding_A, an adapter of an embedding",
    ),
    "magnitude": ({}, lambda t: t | {FIRST.format("magnitude_vector"): torch.ones(64)}, "magnitude_vector.weight, DoRA"),
    "a whole weight": (
        {},
        lambda tensors: tensors | {"base_model.model.model.embed_tokens.weight": torch.ones(256, 64)},
        "holds base_model.model.model.embed_tokens.weight, a whole weight",
    ),
    "another prefix": ({}, lambda tensors: {f"x.{k}": t for k, t in tensors.items()}, "does not begin with base_model.model."),
    "convolution": ({}, lambda t: t | {FIRST.format("A"): torch.ones(4, 128, 1)}, "has shape \\[4, 128, 1\\]"),
    "integers": ({}, lambda t: t | {FIRST.format("A"): torch.ones(4, 128, dtype=torch.int8)}, "is I8, expected a float dtype"),
    "nan": ({}, lambda t: t | {FIRST.format("A"): torch.full((4, 128), torch.nan)}, "down_proj.lora_A.weight holds NaN"),
    "other sizes": (
        {},
        lambda t: t | {FIRST.format("B"): torch.ones(65, 4)},
        "does not fit .*: 1 modules of another shape: model.layers.0.mlp.down_proj \\(\\[65, 128\\], the model has \\[64, 128",
    ),
    "other modules": (
        {},
        lambda t: {k.replace("layers.1.", "layers.7."): v for k, v in t.items()},
        "7 modules that are no linear modules of the model: model.layers.7.mlp.down_proj, .* and 2 more",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, made, tmp_path):
    config, change, message = REFUSED[case]
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    change_config(tmp_path / "adapter", **config)
    if change:
        change_tensors(tmp_path / "adapter", change)
    with pytest.raises(QcliError, match=message) as raised:
        qcli.load(str(made / "model"), adapter=str(tmp_path / "adapter"), device="cpu")
    assert raised.value.hint and "\n" not in raised.value.message


def test_an_unknown_field_is_warned_of(made, tmp_path):
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    change_config(tmp_path / "adapter", use_newer_lora=True)
    with pytest.warns(QcliWarning, match="has use_newer_lora, which this qcli does not know"):
        open_adapter(str(tmp_path / "adapter"))


def test_every_field_of_peft_is_known(made):
    with warnings.catch_warnings():
        warnings.simplefilter("error", QcliWarning)
        adapter = open_adapter(str(made / "adapter"))
    assert adapter.config.keys() >= peft.LoraConfig().to_dict().keys() - {"runtime_config"}


@pytest.mark.parametrize("cut", [0, 5, 300, -7])
def test_damaged_files(cut, made, tmp_path):
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    data = (tmp_path / "adapter/adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(data[:cut])
    with pytest.raises(QcliError, match="adapter_model.safetensors"):
        open_adapter(str(tmp_path / "adapter"))
    (tmp_path / "adapter/adapter_config.json").write_text("{")
    with pytest.raises(QcliError, match="adapter_config.json is not valid JSON"):
        open_adapter(str(tmp_path / "adapter"))


def test_what_is_no_adapter(made, tmp_path):
    with pytest.raises(QcliError, match="has no adapter_config.json"):
        open_adapter(str(made / "model"))
    with pytest.raises(QcliError, match="is a file, expected an adapter's folder"):
        open_adapter(str(made / "adapter/adapter_config.json"))
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").rename(tmp_path / "adapter/adapter_model.bin")
    with pytest.raises(QcliError, match="but adapter_model.bin, which may run code"):
        open_adapter(str(tmp_path / "adapter"))
