"""Where a text ends: at the end of a table of positions, and nowhere else. What a model was made for, with scaled positions."""

import json
import warnings

import pytest
import torch
import transformers as t

from qcli.errors import QcliWarning, UsageError
from qcli.generation import decode, positions
from qcli.generation import graph as decode_graph
from qcli.memory.model.config import ModelConfig
from tests.captures import call_it
from tests.models import ARCHITECTURES, add_tokenizer, make_model

_LIKE_BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "vocab_size": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
}
_LIKE_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 64,
    "is_decoder": True,
}
_LIKE_GPT = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 40}
# name -> model, tokens that it reads at most (None: no end)
MODELS = {
    "gpt2": (t.GPT2LMHeadModel, t.GPT2Config(**_LIKE_GPT), 40),
    "openai-gpt": (t.OpenAIGPTLMHeadModel, t.OpenAIGPTConfig(**_LIKE_GPT), 40),
    "gptj": (t.GPTJForCausalLM, t.GPTJConfig(**_LIKE_GPT, rotary_dim=8), 40),
    "codegen": (t.CodeGenForCausalLM, t.CodeGenConfig(**_LIKE_GPT | {"n_head": 4}, n_ctx=40, rotary_dim=4), 40),
    "ctrl": (t.CTRLLMHeadModel, t.CTRLConfig(**_LIKE_GPT, dff=32), 40),
    "gpt_bigcode": (t.GPTBigCodeForCausalLM, t.GPTBigCodeConfig(**_LIKE_GPT), 40),
    "opt": (t.OPTForCausalLM, ARCHITECTURES["opt"][1](), 64),
    "mpt": (t.MptForCausalLM, t.MptConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=64, max_seq_len=40), 40),
    "bert": (t.BertLMHeadModel, t.BertConfig(**_LIKE_BERT, max_position_embeddings=40), 40),
    "roberta": (t.RobertaForCausalLM, t.RobertaConfig(**_LIKE_BERT, max_position_embeddings=42, pad_token_id=1), 40),
    "bloom": (t.BloomForCausalLM, ARCHITECTURES["bloom"][1](), None),
    "llama": (t.LlamaForCausalLM, ARCHITECTURES["llama"][1](), None),
    "xglm": (
        t.XGLMForCausalLM,
        t.XGLMConfig(d_model=32, ffn_dim=32, num_layers=1, attention_heads=2, vocab_size=64, max_position_embeddings=40),
        None,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_end_of_a_table_is_found_on_the_model(name):
    """As many tokens as are said to be possible are, and one more is not: transformers fails there."""
    model_class, config, end = MODELS[name]
    torch.manual_seed(0)
    model = model_class(config).eval()
    assert positions.ends(model) == (end, end)
    with torch.no_grad():
        model(torch.full((1, end or 90), 5))
        if end is not None:
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.full((1, end + 1), 5))


def test_an_encoder_and_a_decoder_have_an_end_each():
    config = t.LEDConfig(
        **{name: value for name, value in _LIKE_BART.items() if name != "max_position_embeddings"},
        attention_window=4,
        max_encoder_position_embeddings=48,
        max_decoder_position_embeddings=24,
    )
    assert positions.ends(t.LEDForConditionalGeneration(config)) == (48, 24)
    assert positions.ends(t.BartForConditionalGeneration(t.BartConfig(**_LIKE_BART))) == (40, 40)
    assert positions.ends(t.T5ForConditionalGeneration(ARCHITECTURES["t5"][1]())) == (None, None)


class _Tokenizer:
    eos_token_id = None


@pytest.mark.parametrize("name", ["gpt2", "opt", "gptj"])
def test_a_table_bounds_prompt_and_answer(name):
    model_class, config, end = MODELS[name]
    torch.manual_seed(0)
    model = model_class(config).eval()
    model.generation_config.eos_token_id = None
    decoding = decode.Decoding(model, _Tokenizer(), decode.Sampling(max_new_tokens=500))
    assert len(decoding.generate([5] * (end - 6), lambda token: None).token_ids) == 6
    assert len(decoding.generate([5] * (end - 1), lambda token: None).token_ids) == 1
    for too_many in (end, end + 30):
        with pytest.raises(UsageError, match=f"has {too_many} tokens, the model's context holds {end}"):
            decoding.generate([5] * too_many, lambda token: None)


def test_an_encoder_s_table_bounds_the_prompt_and_the_decoder_s_the_answer():
    model = t.BartForConditionalGeneration(t.BartConfig(**_LIKE_BART)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.forced_eos_token_id = None
    decoding = decode.Decoding(model, _Tokenizer(), decode.Sampling(max_new_tokens=500))
    assert len(decoding.generate([5] * 40, lambda token: None).token_ids) == 39
    with pytest.raises(UsageError, match="41 tokens, the model's context holds 40"):
        decoding.generate([5] * 41, lambda token: None)


@pytest.mark.parametrize("captured", [False, True])
def test_beyond_the_context_of_rotary_positions_there_is_a_warning(captured, monkeypatch):
    if captured:
        monkeypatch.setattr(decode_graph, "capture_for", lambda model: call_it)
    model = MODELS["llama"][0](MODELS["llama"][1]).eval()
    model.generation_config.eos_token_id = None
    decoding = decode.Decoding(model, _Tokenizer(), decode.Sampling(max_new_tokens=5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoding.generate([5] * 59, lambda token: None)
    with pytest.warns(QcliWarning, match="the prompt has 100 tokens, the model was made for 64"):
        assert len(decoding.generate([5] * 100, lambda token: None).token_ids) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoding.generate([5] * 110, lambda token: None)  # said once
    again = decode.Decoding(model, _Tokenizer(), decode.Sampling(max_new_tokens=5))
    with pytest.warns(QcliWarning, match="the text has 65 tokens"):
        again.generate([5] * 60, lambda token: None)


def test_a_limit_beyond_any_memory_is_left_to_transformers(monkeypatch):
    monkeypatch.setattr(decode_graph, "capture_for", lambda model: call_it)
    model = MODELS["llama"][0](MODELS["llama"][1]).eval()
    model.generation_config.eos_token_id = list(range(256))
    result = decode.generate(model, _Tokenizer(), [5], decode.Sampling(max_new_tokens=2**62), lambda token: None)
    assert len(result.token_ids) == 1 and result.finished


_LISTS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
# fields of a config -> tokens. Files: Qwen2.5 with YaRN as its card says, DeepSeek-V3, gpt-oss, vicuna-16k, Llama 3.1 and 3.2,
# Phi-3 128k, Gemma 3; and each kind of scaling without what it may leave out.


def _rope(kind: str, factor: float | None = None, original: int | None = None, **more) -> dict:
    fields = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original} | more
    return {name: value for name, value in fields.items() if value is not None}


# max_position_embeddings, rope_scaling, other fields, tokens
SCALED = [
    (32768, _rope("yarn", 4.0, 32768), {}, 131072),
    (163840, _rope("yarn", 40, 4096), {}, 163840),
    (131072, _rope("yarn", 32.0, 4096), {}, 131072),
    (64, _rope("yarn", 4.0), {}, 256),
    (4096, {"type": "linear", "factor": 4.0}, {}, 16384),
    (4096, _rope("dynamic", 2.5), {}, 10240),
    (131072, _rope("llama3", 8.0, 8192), {}, 131072),
    (131072, _rope("llama3", 32.0, 8192), {}, 131072),
    (131072, _rope("longrope", **_LISTS), {"original_max_position_embeddings": 4096}, 131072),
    (64, _rope("longrope", 4.0, 64, **_LISTS), {}, 256),
    (131072, _rope("linear", 8.0), {"rope_local_base_freq": 1e4}, 131072),
    (64, {"full_attention": _rope("linear", 8.0), "sliding_attention": _rope("default")}, {}, 64),
    (64, _rope("default", mrope_section=[1, 2]), {}, 64),
    (64, None, {}, 64),
    (None, _rope("linear", 4.0), {}, None),
]


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("own, rope, fields, expected", SCALED)
def test_the_context_that_scaling_extends(own, rope, fields, expected, name):
    config = {"model_type": "llama", "max_position_embeddings": own, name: rope} | fields
    assert ModelConfig(config, "config.json").max_context == expected


@pytest.mark.parametrize(
    "rope", [{"type": "linear", "factor": "4"}, {"type": "yarn", "factor": -1}, {"type": "dynamic", "factor": 1e300}, "yarn"]
)
def test_a_scaling_that_is_none(rope):
    config = {"model_type": "llama", "max_position_embeddings": 64, "rope_scaling": rope}
    view = ModelConfig(config, "config.json")
    with pytest.raises(UsageError, match="rope_scaling in config.json is"):
        _ = view.max_context


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
    ],
)
def test_the_command_and_the_estimate_agree_on_a_scaled_context(rope, tmp_path, quick_cli, recwarn):
    make_model("llama", tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["rope_parameters"] = rope | {"rope_theta": 10000.0}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    done = quick_cli("generate", "model", "a" * 200, "--max-new-tokens", 2, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["prompt_tokens"] == 200
    assert not [w for w in recwarn if w.category is QcliWarning]
    with pytest.warns(QcliWarning, match="300 tokens, the model was made for 256"):
        quick_cli("generate", "model", "a" * 300, "--max-new-tokens", 2)
    estimate = quick_cli("estimate-memory", "model", "--json")
    assert json.loads(estimate.stdout)["model"]["max_context"] == 256
