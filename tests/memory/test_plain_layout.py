"""The layout of a plain model from its headers and config, against transformers' own, field by field and in the same order."""

import dataclasses
import json
from importlib.metadata import version

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import qcli
from qcli.checkpoint.modules import find_linears
from qcli.checkpoint.source import open_source
from qcli.loading.load import stored_layout
from qcli.memory.model import plain_layout as plain
from qcli.memory.model.plain_layout import CLASSES, COMPARED, plain_layout
from tests.memory.shapes import CASES, SMALL
from tests.models import ARCHITECTURES, make_model

_PLAIN = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "stablelm", "starcoder2"}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
# Configs as they lie on the hub, most of them written by transformers 4, with small numbers in place of theirs.
PUBLISHED = {
    "TinyLlama": ("llama", {"rope_scaling": None, "torch_dtype": "bfloat16", "pretraining_tp": 1, "rms_norm_eps": 1e-05}),
    "Llama 3.1": ("llama", {"rope_theta": 500000.0, "rope_scaling": _LLAMA3 | {"rope_type": "llama3"}, "eos_token_id": [1, 2]}),
    "SmolLM2": ("llama", {"rope_theta": 100000, "tie_word_embeddings": True, "is_llama_config": True, "rope_interleaved": False}),
    "Mistral 7B": ("mistral", {"sliding_window": None, "rope_theta": 1000000.0, "torch_dtype": "bfloat16", "head_dim": 16}),
    "Qwen2.5": (
        "qwen2",
        {
            "use_sliding_window": False,
            "sliding_window": 64,
            "max_window_layers": 21,
            "tie_word_embeddings": True,
            "use_cache": True,
        },
    ),
    "Qwen3": ("qwen3", {"head_dim": 32, "attention_bias": False, "rope_scaling": None, "attention_dropout": 0.0}),
    "Gemma 2": (
        "gemma2",
        {"head_dim": 16, "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid", "attn_logit_softcapping": 50.0},
    ),
    "Gemma 3": (
        "gemma3_text",
        {"head_dim": 16, "rope_local_base_freq": 10000, "rope_theta": 1000000, "sliding_window": 32, "sliding_window_pattern": 6},
    ),
    "Phi-3": ("phi3", {"rope_scaling": None, "sliding_window": 63, "original_max_position_embeddings": 64, "embd_pdrop": 0.0}),
    "OLMo 2": ("olmo2", {"rope_theta": 500000, "rope_scaling": None, "attention_bias": False}),
}


def written(folder, model_type: str, fields: dict):
    """A folder with this config.json, word for word, and the tensors that transformers makes of it."""
    raw = {"architectures": [CLASSES[model_type]], "model_type": model_type} | SMALL | fields
    config = transformers.CONFIG_MAPPING[model_type].from_dict(dict(raw))
    model = getattr(transformers, CLASSES[model_type])(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw))
    return open_source(str(folder))


def assert_same(ours, theirs) -> None:
    for field in dataclasses.fields(theirs):
        found, expected = getattr(ours, field.name), getattr(theirs, field.name)
        assert found == expected, field.name
        if isinstance(expected, dict):
            assert list(found) == list(expected), field.name


def test_the_installed_transformers_was_compared():
    """Where this fails: once the other tests of this file pass with COMPARED raised, raise it."""
    assert COMPARED[0] <= tuple(map(int, version("transformers").split(".")[:2])) <= COMPARED[1]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name, tmp_path):
    make_model(name, tmp_path)
    source = open_source(str(tmp_path))
    found = plain_layout(source)
    assert (found is not None) == (name in _PLAIN)
    if found is not None:
        assert_same(found, find_linears(source))


@pytest.mark.parametrize("case", [case for case, (model_type, _) in CASES.items() if model_type in CLASSES])
def test_the_turns_that_configs_take(case, tmp_path):
    model_type, fields = CASES[case]
    source = written(tmp_path, model_type, fields)
    assert_same(plain_layout(source), find_linears(source))


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_as_they_are_published(name, tmp_path):
    source = written(tmp_path, *PUBLISHED[name])
    assert_same(plain_layout(source), find_linears(source))


@pytest.mark.parametrize("method", ["nf4", "fp4", "llm-int8"])
def test_a_quantized_model(method, tmp_path):
    """What loading asks of it: the linear modules, and that nothing else is amiss."""
    make_model("llama", tmp_path / "model")
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out", method=method, skip=["*.0.mlp.down_proj"])
    source = open_source(str(tmp_path / "out"))
    ours = plain_layout(source)
    theirs = stored_layout(source, transformers.LlamaForCausalLM, transformers.AutoConfig.from_pretrained(tmp_path / "out"))
    for name in ("linears", "candidates", "default_skip", "missing", "unknown", "head", "expert_parameters"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert list(ours.linears) == list(theirs.linears)


@pytest.mark.parametrize("method", ["nf4", "llm-int8"])
def test_the_same_bytes_are_written(method, tmp_path, monkeypatch):
    make_model("qwen2", tmp_path / "model")
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out", method=method)
    quick = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(plain, "plain_layout", lambda source: None)
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out", method=method, overwrite=True)
    assert quick == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


CHANGES = {
    "a field that is not known": {"attn_implementation_of_mine": "x"},
    "a field of a wrong type": {"rms_norm_eps": "small"},
    "null where a number belongs": {"num_key_value_heads": None},
    "an activation that does not exist": {"hidden_act": "silly"},
    "a rope that is not known": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}},
    "a rope without its factor": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0}},
    "code of its own": {"auto_map": {"AutoModelForCausalLM": "modeling.Own"}},
    "another class": {"architectures": ["LlamaForSequenceClassification"]},
    "another type": {"model_type": "newest"},
    "heads that do not divide": {"num_attention_heads": 5},
    "padding beyond the vocabulary": {"pad_token_id": 256},
    "another width": {"intermediate_size": 127},
    "fewer layers": {"num_hidden_layers": 1},
    "biases that are not there": {"mlp_bias": True},
    "a head that is not tied": {"tie_word_embeddings": True},
    "truth as a number": {"use_cache": 1},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_odd_is_left_to_transformers(change, tmp_path):
    make_model("llama", tmp_path)
    assert plain_layout(open_source(str(tmp_path))) is not None
    config = json.loads((tmp_path / "config.json").read_text()) | CHANGES[change]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plain_layout(open_source(str(tmp_path))) is None


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size", "architectures"])
def test_a_missing_field_is_left_to_transformers(field, tmp_path):
    make_model("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config[field]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plain_layout(open_source(str(tmp_path))) is None


@pytest.mark.parametrize("damage", ["missing", "more", "misshaped", "renamed"])
def test_tensors_that_do_not_fit_are_left_to_transformers(damage, tmp_path):
    make_model("llama", tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(tmp_path / "model.safetensors")
    if damage == "misshaped":
        tensors[name] = tensors[name][:-1].clone()
    elif damage == "more":
        tensors["extra.weight"] = torch.zeros(64, 64)
    else:
        taken = tensors.pop(name)
        tensors |= {"layers.1.mlp.up_proj.weight": taken} if damage == "renamed" else {}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    source = open_source(str(tmp_path))
    assert plain_layout(source) is None


def test_a_transformers_that_was_not_compared_is_asked(tmp_path, monkeypatch):
    make_model("llama", tmp_path)
    source = open_source(str(tmp_path))
    for other in ("5.16.9", "5.99.0", "6.0.0", "5.25.0.dev0", "unknown"):
        monkeypatch.setattr("importlib.metadata.version", lambda name, other=other: other)
        assert plain_layout(source) is None, other
