"""The cache's bytes against the tensors that transformers keeps, and against published figures."""

import math

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from qcli.errors import UsageError
from qcli.memory.costs.cache import cache
from qcli.memory.model.config import ModelConfig
from tests.memory.tiny import CONFIGS

GIB = 2**30
BATCH, PROMPT = 2, 20
UNROUNDED = [name for name in CONFIGS if name != "deepseek_v4"]


def stored(value, seen) -> int:
    """Bytes of every storage that `value` keeps alive, each once; the window lengths kept as tensors aside."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        fresh = value.numel() > 1 and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        return storage.nbytes() if fresh else 0
    if isinstance(value, dict):
        return sum(stored(item, seen) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(stored(item, seen) for item in value)
    return stored(vars(value), seen) if hasattr(value, "keys") or hasattr(value, "conv_states") else 0


def run(name: str):
    """(bytes kept after a prompt, bytes kept after one more token) in a tiny random model of the family `name`."""
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**CONFIGS[name]), dtype=torch.bfloat16).eval()
    prompt = torch.arange(BATCH * PROMPT).reshape(BATCH, PROMPT) % 64
    kept = []
    with torch.no_grad():
        out = model(prompt, use_cache=True)
        for _ in range(2):
            key = next(name for name in ("cache", "cache_params", "past_key_values") if name in out)
            past = out[key]
            kept.append(stored(past.layers, set()) + stored(getattr(past, "linear_cache", []), set()))
            out = model(prompt[:, :1], use_cache=True, **{key: past})
    return kept


def config(name: str, **fields) -> ModelConfig:
    return ModelConfig({"model_type": name, "dtype": "bfloat16"} | CONFIGS.get(name, {}) | fields, "config.json")


@pytest.mark.parametrize("name", UNROUNDED)
def test_bytes_are_those_of_the_tensors_that_transformers_keeps(name):
    after_prompt, after_step = run(name)
    prompt, step = cache(config(name), PROMPT, BATCH), cache(config(name), PROMPT + 1, BATCH)
    assert prompt.total + prompt.prompt_extra == after_prompt
    assert step.total == after_step
    assert sum(step.components.values()) == sum(step.by_layer) == step.total


def test_groups_that_wait_to_be_compressed_are_counted_whole():
    _, after_step = run("deepseek_v4")
    ours = cache(config("deepseek_v4"), PROMPT + 1, BATCH).total
    waiting = 2 * BATCH * 2 * (127 * 16 + 2 * 2 * 3 * (16 + 16))
    assert after_step <= ours <= after_step + waiting


def llama_like(layers, heads, kv_heads, head_dim, **fields) -> ModelConfig:
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    return config("llama", hidden_size=heads * head_dim, **sizes, **fields)


DEEPSEEK_V3 = {
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
QWEN3_NEXT = {
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
}
JAMBA = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "mamba_expand": 2,
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
}
GEMMA3_27B = {
    "num_hidden_layers": 62,
    "hidden_size": 5376,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
}
GEMMA2_27B = GEMMA3_27B | {"num_hidden_layers": 46, "hidden_size": 4608, "sliding_window": 4096}
GPT_OSS_120B = {
    "num_hidden_layers": 36,
    "hidden_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 128,
}
QWEN3_5_27B = QWEN3_NEXT | {"num_hidden_layers": 64, "hidden_size": 5120, "num_attention_heads": 24, "num_key_value_heads": 4}


@pytest.mark.parametrize(
    ("name", "made", "expected"),
    [
        ("Llama-2-7B", llama_like(32, 32, 32, 128), 524_288),
        ("Llama-3.1-8B, Mistral-7B", llama_like(32, 32, 8, 128), 131_072),
        ("Llama-3.1-70B", llama_like(80, 64, 8, 128), 327_680),
        ("Llama-3.1-405B", llama_like(126, 128, 8, 128), 516_096),
        ("Qwen2.5-7B", llama_like(28, 28, 4, 128), 57_344),
        ("Qwen3-8B", llama_like(36, 32, 8, 128), 147_456),
        ("DeepSeek-V2", config("deepseek_v2", **DEEPSEEK_V3 | {"num_hidden_layers": 60}), 69_120),
        ("DeepSeek-V2-Lite", config("deepseek_v2", **DEEPSEEK_V3 | {"num_hidden_layers": 27}), 31_104),
        ("DeepSeek-V3", config("deepseek_v3", **DEEPSEEK_V3), 70_272),
        ("Qwen3-Next-80B", config("qwen3_next", **QWEN3_NEXT), 24_576),
        ("Jamba-v0.1", config("jamba", **JAMBA), 16_384),
    ],
)
def test_bytes_per_token_of_published_models(name, made, expected):
    assert cache(made, 1000).per_token == expected
    assert cache(made, 1001).total - cache(made, 1000).total == expected
    assert cache(made, 1000, batch=3).per_token == 3 * expected


def test_latents_expanded_are_71_times_as_large():
    assert cache(config("deepseek_v3", **DEEPSEEK_V3), 1, runtime="transformers4").total == 4_997_120
    assert cache(config("deepseek_v3", **DEEPSEEK_V3), 16, runtime="vllm").total == 16 * 70_272


@pytest.mark.parametrize(
    ("made", "context", "gib"),
    [
        (config("gemma3_text", **GEMMA3_27B), 131_072, 10.41),
        (config("gemma2", **GEMMA2_27B), 131_072, 23.72),
        (config("gpt_oss", **GPT_OSS_120B), 131_072, 4.50),
        (config("deepseek_v3", **DEEPSEEK_V3), 163_840, 10.72),
        (llama_like(32, 32, 32, 128), 262_144, 128.0),
        (llama_like(32, 32, 8, 128), 262_144, 32.0),
    ],
)
def test_published_totals(made, context, gib):
    assert round(cache(made, context).total / GIB, 2) == gib


def test_a_long_prompt_stays_whole_in_sliding_layers_until_the_next_step():
    made = cache(config("gemma3_text", **GEMMA3_27B), 131_072)
    assert made.total + made.prompt_extra == 62 * GIB  # 62 layers x 8,192 bytes x 131,072 tokens
    assert cache(config("gemma3_text", **GEMMA3_27B), 1024).prompt_extra == 0


@pytest.mark.parametrize(("state_dtype", "mib"), [("float32", 73.7), ("bfloat16", 37.7), (None, 37.7)])
def test_recurrent_state_of_qwen3_next_in_vllm(state_dtype, mib):
    shape = config("qwen3_next", **QWEN3_NEXT, layer_types=["linear_attention"] * 48)
    state = cache(shape, 1, runtime="vllm", state_dtype=state_dtype).components["recurrent state"]
    assert round(state * 36 / 48 / 2**20, 1) == mib


def test_hybrid_pages_are_padded_as_vllm_says():
    """vLLM logs "attention block size to 544 tokens" for Qwen3-Next-80B: 36 states and 12 layers of one block each."""
    made = cache(config("qwen3_next", **QWEN3_NEXT), 1, runtime="vllm")
    assert made.total == 48 * 544 * 2048


def test_state_and_cache_of_jamba():
    made = cache(config("jamba", **JAMBA), 262_144, runtime="transformers")
    assert made.components["keys and values"] == 4 * GIB
    assert made.components["recurrent state"] == 28 * (8192 * 4 * 2 + 8192 * 16 * 4)


def test_qwen3_5_27b():
    assert cache(config("qwen3_5_text", **QWEN3_5_27B), 262_144).components["keys and values"] == 16 * GIB


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 4), ("fp8", 1), ("q8_0", 1.0625), ("q4_0", 0.5625), ("nvfp4", 0.5625), ("int8", 1 + 4 / 128)]
)
def test_dtypes_of_the_cache(dtype, size):
    assert cache(llama_like(32, 32, 8, 128), 100, kv_dtype=dtype).total == math.ceil(65_536 * size) * 100


def test_vllm_rounds_to_blocks_and_keeps_a_chunk_beside_the_window():
    made = config("gemma3_text", **GEMMA3_27B)
    assert cache(made, 17, runtime="vllm").total == 62 * 8192 * 32
    long = cache(made, 131_072, runtime="vllm", chunk=2048).components["keys and values, sliding window"]
    assert long == 52 * 8192 * (1024 - 1 + 2048 + 16 + 1)  # 3,087 tokens fill 193 blocks


def test_encoder_decoder_keeps_the_keys_of_its_input():
    made = ModelConfig(
        {
            "model_type": "t5",
            "d_model": 64,
            "num_layers": 3,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "d_kv": 16,
            "d_ff": 96,
            "vocab_size": 64,
            "is_encoder_decoder": True,
            "dtype": "float32",
        },
        "config.json",
    )
    found = cache(made, 5, batch=2, encoder_tokens=11)
    assert found.components["keys and values"] == 2 * 2 * 2 * 64 * 5 * 4
    assert found.components["cross-attention keys and values"] == 2 * 2 * 2 * 64 * 11 * 4


def test_the_formula_tells_the_numbers():
    assert cache(llama_like(32, 32, 8, 128), 100, batch=2).formula == (
        "keys and values: 32 layers x (8 heads x (128 + 128): 4096 bytes a token x 100 tokens) x 2 sequences = 26214400 bytes",
    )


def test_what_is_asked_wrongly():
    with pytest.raises(UsageError, match="runtime is 'tgi', expected one of transformers, transformers4, vllm"):
        cache(llama_like(1, 1, 1, 8), 1, runtime="tgi")
    with pytest.raises(UsageError, match="dtype is 'int3'"):
        cache(llama_like(1, 1, 1, 8), 1, kv_dtype="int3")
