"""config.json read without transformers, against what transformers makes of the same file."""

import dataclasses
import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.cache_utils import get_layer_types_and_kwargs

from qcli.errors import UsageError
from qcli.memory.installed import transformers_version
from qcli.memory.model.config import ModelConfig, class_defaults
from tests.memory.tiny import CONFIGS

NEW = {"internlm3"} - set(CONFIG_MAPPING)  # not in the oldest transformers
FAMILIES = sorted(set(class_defaults()) - NEW)
# These have a list of layers in the file, and no other rule.
LISTED = {"nemotron_h", "zamba", "zamba2", "recurrent_gemma"}
TEXT_ONLY = [name for name in FAMILIES if "text_config" not in CONFIG_MAPPING[name].sub_configs and name not in LISTED]
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "tie_word_embeddings": False,
    "dtype": "float16",
}
NAMES = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_context": "max_position_embeddings",
    "tied_embeddings": "tie_word_embeddings",
}


OLD_KINDS = {"moe": "dummy", "mlp": "dummy", "deepseek_sparse_attention": "indexed_attention"}  # before 5.18


def config(**fields) -> ModelConfig:
    return ModelConfig(LLAMA | fields, "config.json of org/name")


@pytest.mark.parametrize("name", FAMILIES)
def test_class_defaults_are_those_of_transformers(name):
    if name == "mimo_v2_flash" and transformers_version() < (5, 20):
        pytest.skip("its window was one token shorter then")
    theirs = {field.name: field.default for field in dataclasses.fields(CONFIG_MAPPING[name])}
    assert class_defaults()[name] == {field: theirs[field] for field in class_defaults()[name]}


def compare(ours: ModelConfig, theirs) -> None:
    object.__setattr__(theirs, "allow_global_per_layer_attribute_access", True)
    for mine, name in NAMES.items():
        expected = getattr(theirs, name, None)
        if name == "num_hidden_layers" and theirs.model_type == "longcat_flash":
            expected = 2 * theirs.num_layers
        if expected is not None:
            assert getattr(ours, mine) == expected, mine
    types = ["dummy" if kind in ("moe", "mlp") else kind for kind in ours.layer_types]
    shared = ours.get("num_kv_shared_layers", default=0)
    expected = [OLD_KINDS.get(kind, kind) for kind in get_layer_types_and_kwargs(theirs)[0]]
    assert types == expected[: len(types) - shared] + types[len(types) - shared :]


@pytest.mark.parametrize("name", TEXT_ONLY)
def test_an_empty_text_config_is_that_of_the_class(name):
    compare(ModelConfig({"model_type": "outer", "text_config": {"model_type": name}}, "config.json"), CONFIG_MAPPING[name]())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_tiny_config_is_read_as_transformers_reads_it(name):
    theirs = CONFIG_MAPPING[name](**CONFIGS[name])
    compare(ModelConfig({"model_type": name} | CONFIGS[name], "config.json"), theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_config_is_read_as_transformers_reads_it(name):
    theirs = CONFIG_MAPPING[name](**CONFIGS[name])
    compare(ModelConfig(theirs.to_dict(), "config.json"), theirs)


@pytest.mark.parametrize("name", sorted(LISTED - {"nemotron_h"}))
def test_kinds_of_layers_that_only_a_list_tells(name):
    with pytest.raises(UsageError, match="block_type"):
        _ = config(model_type=name).layer_types
    kinds = ["recurrent", "attention"] if name == "recurrent_gemma" else ["mamba", "hybrid"]
    field = "block_types" if name == "recurrent_gemma" else "layers_block_type"
    expected = ["linear_attention", "sliding_attention" if name == "recurrent_gemma" else "hybrid"]
    assert config(model_type=name, **{field: kinds}).layer_types == expected


MIXTURES = {
    **{name: CONFIGS[name] for name in ("deepseek_v2", "deepseek_v3", "glm_moe_dsa", "llama4_text", "qwen3_next", "jamba")},
    "mixtral": CONFIGS["llama"] | dict(num_local_experts=2),
    "qwen2_moe": CONFIGS["llama"] | dict(num_experts=2, moe_intermediate_size=8, decoder_sparse_step=2),
    "qwen3_moe": CONFIGS["llama"] | dict(num_experts=2, moe_intermediate_size=8, mlp_only_layers=[0, 3]),
    "ernie4_5_moe": CONFIGS["llama"]
    | dict(moe_num_experts=2, moe_k=1, moe_intermediate_size=8, moe_layer_start_index=1, moe_layer_end_index=2),
    "lfm2_moe": CONFIGS["lfm2"] | dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, num_dense_layers=3),
    "gpt_oss": CONFIGS["llama"] | dict(num_local_experts=2, num_experts_per_tok=1, head_dim=16),
    "llama": CONFIGS["llama"],
}


@pytest.mark.parametrize("name", MIXTURES)
def test_layers_with_experts_are_those_of_the_model(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**MIXTURES[name]))
    with_experts = {int(key.split(".")[2]) for key, _ in model.named_parameters() if ".experts." in key}
    ours = ModelConfig({"model_type": name} | MIXTURES[name], "config.json")
    assert {i for i in range(ours.layers) if ours.is_moe_layer(i)} == with_experts


def test_a_null_is_absent_but_not_the_class_default():
    assert config(model_type="mistral").sliding_window == 4096
    assert config(model_type="mistral", sliding_window=None).sliding_window is None
    assert config(model_type="mistral", sliding_window=None).layer_types == ["full_attention"] * 2
    assert config(num_key_value_heads=None).kv_heads == 4
    assert config(head_dim=None).head_dim == 16


def test_every_default_is_told_once():
    made = config(model_type="mistral")
    assert (made.kv_heads, made.kv_heads, made.layers) == (8, 8, 2)
    assert made.assumed == ["num_key_value_heads is not in config.json of org/name: 8, the default of mistral."]
    del made.raw["dtype"]
    assert made.dtype == "bfloat16" and made.assumed[1:] == ["dtype is not in config.json of org/name: bfloat16."]


def test_the_language_model_of_a_multimodal_config():
    gemma = {"model_type": "gemma3", "text_config": {"hidden_size": 2560, "num_hidden_layers": 34}, "torch_dtype": "bfloat16"}
    made = ModelConfig(gemma, "config.json")
    assert (made.model_type, made.layers, made.heads, made.kv_heads, made.head_dim) == ("gemma3_text", 34, 8, 4, 256)
    assert (made.vocab_size, made.tied_embeddings, made.dtype) == (262208, True, "bfloat16")
    omni = {"model_type": "qwen2_5_omni", "thinker_config": {"text_config": LLAMA}}
    assert ModelConfig(omni, "config.json").hidden_size == 64


@pytest.mark.parametrize(
    ("fields", "head_width"),
    [
        ({"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "n_inner": None}, 256),
        ({"model_type": "mpt", "n_layers": 2, "d_model": 64, "n_heads": 4, "expansion_ratio": 3}, 192),
        ({"model_type": "bloom", "n_layer": 2, "n_embed": 64, "num_attention_heads": 4}, 256),
        ({"model_type": "dbrx", "n_layers": 2, "d_model": 64, "n_heads": 4, "ffn_config": {"ffn_hidden_size": 80}}, 80),
    ],
)
def test_aliases(fields, head_width):
    made = ModelConfig(fields, "config.json")
    assert (made.layers, made.hidden_size, made.heads, made.head_dim) == (2, 64, 4, 16)
    assert made.intermediate_size == head_width


def test_key_and_value_heads_by_family():
    falcon = dict(model_type="falcon", num_kv_heads=2)
    assert config(**falcon, new_decoder_architecture=True).kv_heads == 2
    assert config(**falcon, multi_query=True).kv_heads == 1
    assert config(**falcon, multi_query=False).kv_heads == 2
    assert config(model_type="falcon", multi_query=False).kv_heads == 4
    assert config(model_type="chatglm", multi_query_attention=True, multi_query_group_num=2, kv_channels=8).kv_heads == 2
    assert config(model_type="mpt", attn_config={"kv_n_heads": 2}).kv_heads == 2


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"hidden_size": None}, "hidden_size", "org/name has no hidden_size"),
        ({"num_hidden_layers": 0}, "layers", "num_hidden_layers in config.json of org/name is 0, expected at least 1"),
        ({"vocab_size": "32k"}, "vocab_size", "vocab_size in config.json of org/name is '32k', expected a whole number"),
        ({"num_attention_heads": -4}, "heads", "is -4, expected a whole number"),
        ({"layer_types": ["full_attention"]}, "layer_types", "types 1 layers, and the model has 2"),
        ({"layer_types": "full_attention"}, "layer_types", "is 'full_attention', expected a list"),
        ({"hybrid_override_pattern": "M?"}, "layer_types", r"hybrid_override_pattern in config.json of org/name has '\?'"),
        ({"num_hidden_layers": 10**6}, "layers", "is 1,000,000, expected at most 10,000"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "layer_types", "is 0, expected at least 1"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": "x"}, "layer_types", "is 'x', expected a whole number"),
        ({"model_type": "qwen3_next", "full_attention_interval": 0}, "layer_types", "is 0, expected at least 1"),
        ({"attn_config": 8}, "kv_heads", "attn_config in config.json of org/name is 8, expected an object"),
    ],
)
def test_bad_fields_are_named(fields, field, message):
    with pytest.raises(UsageError, match=message):
        getattr(config(**fields), field)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"moe_layer_freq": 0}, "moe_layer_freq in config.json of org/name is 0, expected at least 1"),
        ({"mlp_only_layers": "x"}, "mlp_only_layers in config.json of org/name is 'x', expected a list"),
    ],
)
def test_bad_fields_of_a_mixture_are_named(fields, message):
    with pytest.raises(UsageError, match=message):
        config(num_experts=2, **fields).is_moe_layer(1)


def test_what_is_not_a_model():
    with pytest.raises(UsageError, match="holds list, expected a JSON object"):
        ModelConfig([], "config.json")
    with pytest.raises(UsageError, match="has no model_type"):
        ModelConfig({"architectures": ["LlamaForCausalLM"]}, "config.json")
    missing = {key: value for key, value in LLAMA.items() if key != "num_hidden_layers"}
    with pytest.raises(UsageError, match="has no num_hidden_layers"):
        _ = ModelConfig(missing, "config.json").layers


@pytest.mark.parametrize(
    "model_type",
    [
        "bart",
        "pegasus",
        "marian",
        "t5",
        "xlm",
        "xglm",
        "trocr",
        "fsmt",
        "bloom",
        "gpt_neo",
        "mpt",
        "ctrl",
        "dbrx",
        "rwkv",
        "prophetnet",
    ],
)
def test_the_many_names_of_sizes(model_type):
    """Layer counts and widths under each family's own names are those that transformers' attribute maps lead to."""
    theirs = CONFIG_MAPPING[model_type]()
    ours = ModelConfig(json.loads(theirs.to_json_string(use_diff=False)), "config.json")
    layers = getattr(theirs, "decoder_layers", None) or getattr(theirs, "num_decoder_layers", None) or theirs.num_hidden_layers
    assert (ours.layers, ours.hidden_size, ours.vocab_size) == (layers, theirs.hidden_size, theirs.vocab_size)
    if model_type != "rwkv":  # has no heads
        heads = getattr(theirs, "decoder_attention_heads", None) or getattr(theirs, "num_decoder_attention_heads", None)
        assert ours.heads == theirs.num_attention_heads or ours.heads == heads


@pytest.mark.parametrize("field", ["hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"])
def test_sizes_beyond_all_machines(field):
    raw = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100}
    config = ModelConfig(raw | {field: 2**62}, "config.json")
    name = {"num_attention_heads": "heads", "max_position_embeddings": "max_context"}.get(field, field)
    with pytest.raises(UsageError, match=f"{field} in config.json is 4,611,686,018,427,387,904, expected at most"):
        getattr(config, name)


def test_more_heads_than_the_model_is_wide():
    raw = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2_000_000, "vocab_size": 100}
    with pytest.raises(UsageError, match="config.json has 2,000,000 attention heads for a width of 64"):
        _ = ModelConfig(raw, "config.json").head_dim
