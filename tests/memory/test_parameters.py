"""Parameters from config.json alone, against the model that transformers builds on the meta device."""

import json
import re

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from qcli.errors import UsageError
from qcli.memory.model.config import ModelConfig
from qcli.memory.model.families import families
from qcli.memory.model.like_llama import from_size
from qcli.memory.model.parameters import parameters
from qcli.memory.model.tensor_rules import KINDS
from tests.memory.shapes import CASES, LLAMAS, OTHERS, PAPER, SMALL

_AUTO = {"t5": transformers.AutoModelForSeq2SeqLM, "gemma3": transformers.AutoModelForImageTextToText}


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_are_those_of_transformers(case):
    model_type, fields = CASES[case]
    theirs = transformers.AutoConfig.for_model(model_type, **fields)
    with torch.device("meta"):
        model = _AUTO.get(model_type, transformers.AutoModelForCausalLM).from_config(theirs)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    ours = parameters(ModelConfig(json.loads(theirs.to_json_string()), "config.json"))
    assert {p.name: p.shape for p in ours} == expected
    assert all(p.kind in KINDS for p in ours)
    sparse = parameters(ModelConfig({"model_type": model_type, **fields}, "config.json"))
    # transformers ties T5's head whatever the file says, until it finds another one stored, as v1.1's checkpoints have it.
    stored = {"lm_head.weight": (256, 64)} if case == "t5-v1.1" else {}
    assert {p.name: p.shape for p in sparse} == expected | stored

    keep_fp32 = sorted(model._keep_in_fp32_modules or [])
    skipped = get_keys_to_not_convert(model) + keep_fp32
    linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear or isinstance(m, Conv1D)}
    converted = {f"{name}.weight" for name in linears if should_convert_module(name, skipped)}
    assert {p.name for p in ours if p.quantizable} == converted
    assert {p.name for p in ours if p.transposed} == {f"{n}.weight" for n, m in linears.items() if isinstance(m, Conv1D)}
    kept = {name for name, _ in model.named_parameters() if any(re.search(key, name) for key in keep_fp32)}
    assert {p.name for p in ours if p.keep_fp32} == kept


def test_every_family_is_compared():
    assert {model_type for model_type, _ in CASES.values()} == set(families())


PUBLISHED = {  # of model cards, and of the formulas for biases and norms in the papers
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-2-70B": 68_976_648_192,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Mistral-7B": 7_241_732_096,
    "OPT-175B": 174_604_468_224,
    "BLOOM-176B": 176_247_271_424,
    "OPT-66B": 65_719_701_504,
    "OPT-30B": 29_974_540_288,
    "OPT-13B": 12_853_473_280,
    "OPT-6.7B": 6_658_473_984,
    "GPT-J-6B": 6_050_882_784,
    "GPT-2 XL": 1_557_611_200,
    "T5-11B": 11_307_321_344,
    "T0": 11_135_332_352,
    "Mixtral-8x7B": 46_702_792_704,
    "gpt-oss-120b": 116_829_156_672,
    "Gemma-3-4B": 4_300_079_472,
    "DeepSeek-V3": 671_026_419_200 - 58 * 256,  # without the routers' correction biases, which are buffers
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_published_counts(name):
    config = ModelConfig((LLAMAS | PAPER | OTHERS)[name], name)
    assert sum(p.numel for p in parameters(config)) == PUBLISHED[name]


def test_kinds_and_layers_of_a_mixture():
    config = ModelConfig({"model_type": "qwen2_moe", **CASES["qwen2_moe"][1]}, "config.json")
    found = {p.name: (p.kind, p.layer, p.quantizable) for p in parameters(config)}
    assert found["model.embed_tokens.weight"] == ("embedding", None, False)
    assert found["model.layers.1.self_attn.k_proj.bias"] == ("attention", 1, False)
    assert found["model.layers.1.mlp.gate.weight"] == ("router", 1, False)
    assert found["model.layers.0.mlp.experts.down_proj"] == ("experts", 0, False)
    assert found["model.layers.0.mlp.shared_expert.down_proj.weight"] == ("ffn", 0, True)
    assert found["model.layers.0.mlp.shared_expert_gate.weight"] == ("router", 0, True)
    assert found["model.norm.weight"] == ("norm", None, False)
    assert found["lm_head.weight"] == ("head", None, False)


def test_a_vision_tower_is_no_layer_of_the_language_model():
    config = ModelConfig(OTHERS["Gemma-3-4B"], "config.json")
    tower = [p for p in parameters(config) if "vision_tower" in p.name]
    assert len(tower) == 27 * 16 + 5 and {(p.kind, p.layer) for p in tower} == {("other", None)}


def test_an_unknown_family_is_named_and_so_are_the_known():
    with pytest.raises(UsageError) as caught:
        parameters(ModelConfig({"model_type": "newest", **SMALL}, "new/config.json"))
    assert "new/config.json" in caught.value.message and "'newest'" in caught.value.message
    assert "llama" in caught.value.message and "qwen3_next" in caught.value.message and "safetensors" in caught.value.hint


@pytest.mark.parametrize("missing", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_missing_field_is_named(missing):
    raw = {"model_type": "llama"} | {name: value for name, value in SMALL.items() if name != missing}
    with pytest.raises(UsageError, match=missing):
        parameters(ModelConfig(raw, "config.json"))


def test_what_else_a_multimodal_model_holds_is_said_not_to_be_counted():
    raw = {"model_type": "llava", "text_config": {"model_type": "llama", **SMALL}, "vision_config": {"hidden_size": 8}}
    config = ModelConfig(raw, "llava/config.json")
    alone = parameters(ModelConfig({"model_type": "llama", **SMALL}, "config.json"))
    assert sum(p.numel for p in parameters(config)) == sum(p.numel for p in alone)
    assert any("Only the language model" in sentence for sentence in config.assumed)


def test_the_shape_of_8b_is_that_of_llama_3():
    config = from_size("8B")
    assert {p.name: p.shape for p in parameters(config)} == {
        p.name: p.shape for p in parameters(ModelConfig(LLAMAS["Llama-3.1-8B"], "Llama-3.1-8B"))
    }
    assert config.max_context == 131_072 and "8,030,261,248" in config.assumed[0] and "32 layers" in config.assumed[0]


@pytest.mark.parametrize(
    ("size", "count"), [("100M", 1e8), ("350m", 3.5e8), ("1.5B", 1.5e9), ("7B", 7e9), ("13e9", 13e9), ("70B", 7e10), ("1T", 1e12)]
)
def test_a_size_gives_about_so_many_parameters_in_common_proportions(size, count):
    config = from_size(size)
    assert sum(p.numel for p in parameters(config)) == pytest.approx(count, rel=0.03)
    assert 50 < config.hidden_size / config.layers < 165 and config.kv_heads == 8


@pytest.mark.parametrize("size", ["", "seven", "7Q", "-7B", "10M", "1e30", "7B8", "nan"])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(UsageError, match="expected 100M to 100T parameters"):
        from_size(size)


@pytest.mark.parametrize(
    ("vision", "said"), [([1], "vision_config"), ({"hidden_size": "wide"}, "hidden_size"), ({"patch_size": 0}, "patch_size")]
)
def test_a_wrong_vision_config_is_named(vision, said):
    with pytest.raises(UsageError, match=said):
        parameters(ModelConfig(OTHERS["Gemma-3-4B"] | {"vision_config": vision}, "config.json"))
