"""Peaks of activations against the tensors that are alive in transformers' models, counted on the meta device."""

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    DynamicCache,
    GPTJPreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from qcli.errors import UsageError
from qcli.generation.step import cache_argument
from qcli.memory.costs.activations import activations
from qcli.memory.costs.cache import cache
from qcli.memory.model.config import ModelConfig
from tests.memory.live import Live, fused_attention

H, F, D = 512, 1536, 64
LLAMA = dict(
    vocab_size=128,
    num_hidden_layers=4,
    hidden_size=H,
    intermediate_size=F,
    num_attention_heads=8,
    num_key_value_heads=4,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=0,
)
PLAIN = {name: value for name, value in LLAMA.items() if name not in ("intermediate_size", "num_key_value_heads")}
GPT = dict(vocab_size=128, n_layer=4, n_embd=H, n_head=8, n_inner=F)
MOE = LLAMA | dict(num_local_experts=8, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=F)
MLA = dict(
    kv_lora_rank=64,
    q_lora_rank=96,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=40,
    n_routed_experts=8,
    n_group=1,
    topk_group=1,
    n_shared_experts=1,
    first_k_dense_replace=1,
    num_key_value_heads=8,
)
MAMBA_2 = dict(mamba_n_heads=16, mamba_d_head=64, mamba_d_state=128)
ALTERNATING = ["sliding_attention", "full_attention"] * 2
MODELS = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA | dict(head_dim=D),
    "gemma": LLAMA | dict(head_dim=D),
    "gemma2": LLAMA | dict(head_dim=D, sliding_window=64),
    "gemma3_text": LLAMA | dict(head_dim=D, sliding_window=64),
    "mistral": LLAMA | dict(sliding_window=64),
    "phi": LLAMA,
    "phi3": LLAMA,
    "gpt2": GPT,
    "gptj": GPT | dict(rotary_dim=16),
    "gpt_neo": dict(
        vocab_size=128, num_layers=4, hidden_size=H, num_heads=8, intermediate_size=F, attention_types=[[["global", "local"], 2]]
    ),
    "gpt_neox": PLAIN | dict(intermediate_size=F),
    "opt": PLAIN | dict(ffn_dim=F, word_embed_proj_dim=H),
    "bloom": dict(vocab_size=128, n_layer=4, hidden_size=H, n_head=8),
    "falcon": PLAIN | dict(ffn_hidden_size=F),
    "mpt": dict(vocab_size=128, n_layers=4, d_model=H, n_heads=8, expansion_ratio=3),
    "starcoder2": LLAMA,
    "granite": LLAMA,
    "olmo2": LLAMA,
    "cohere": LLAMA,
    "stablelm": LLAMA,
    "mixtral": MOE,
    "qwen2_moe": MOE | dict(shared_expert_intermediate_size=F),
    "qwen3_moe": MOE | dict(head_dim=D),
    "gpt_oss": MOE | dict(head_dim=D, sliding_window=64),
    "deepseek_v2": MOE | MLA,
    "deepseek_v3": MOE | MLA,
    "qwen3_next": MOE
    | dict(
        head_dim=D,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        shared_expert_intermediate_size=F,
    ),
    "glm4": LLAMA | dict(head_dim=D),
    "nemotron": LLAMA | dict(head_dim=D),
    "persimmon": LLAMA,
    "gpt_bigcode": GPT,
    "codegen": GPT | dict(rotary_dim=16),
    "olmo3": LLAMA | dict(sliding_window=64),
    "exaone4": LLAMA | dict(sliding_window=64),
    "cohere2": LLAMA | dict(head_dim=D, sliding_window=64),
    "ernie4_5": LLAMA,
    "olmoe": MOE,
    "phimoe": MOE,
    "glm4_moe": MOE | dict(head_dim=D, first_k_dense_replace=1, n_routed_experts=8, n_group=1, topk_group=1),
    "llama4_text": MOE | dict(head_dim=D, intermediate_size_mlp=F, attention_chunk_size=64, interleave_moe_layer_step=1),
    "mimo_v2_flash": MOE | dict(head_dim=D, v_head_dim=D, n_routed_experts=8, sliding_window=64),
    "gemma3n_text": LLAMA
    | dict(
        head_dim=D,
        sliding_window=64,
        num_kv_shared_layers=0,
        layer_types=ALTERNATING,
        hidden_size_per_layer_input=64,
        vocab_size_per_layer_input=128,
        laurel_rank=8,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "gemma4_text": LLAMA
    | dict(
        head_dim=D,
        global_head_dim=D,
        sliding_window=64,
        num_kv_shared_layers=0,
        layer_types=ALTERNATING,
        hidden_size_per_layer_input=64,
        vocab_size_per_layer_input=128,
    ),
    "lfm2": LLAMA | dict(layer_types=["conv", "full_attention", "conv", "conv"], block_auto_adjust_ff_dim=False),
    "jamba": LLAMA | dict(num_experts=1, attn_layer_period=4, attn_layer_offset=2),
    "bamba": LLAMA | MAMBA_2 | dict(attn_layer_indices=[2]),
    "falcon_h1": LLAMA | MAMBA_2 | dict(mamba_d_ssm=1024),
    "nemotron_h": {name: value for name, value in LLAMA.items() if name != "num_hidden_layers"}
    | dict(hybrid_override_pattern="M*-M", head_dim=D, mamba_num_heads=16, mamba_head_dim=64, ssm_state_size=128, n_groups=1),
    "granitemoehybrid": MOE | MAMBA_2 | dict(layer_types=["mamba", "attention", "mamba", "mamba"], shared_intermediate_size=F),
    "mamba": dict(vocab_size=128, num_hidden_layers=4, hidden_size=H),
    "mamba2": dict(vocab_size=128, num_hidden_layers=4, hidden_size=H, num_heads=16, head_dim=64, n_groups=1),
    "kimi_linear": MOE | MLA | dict(linear_num_heads=8, linear_head_dim=64, layer_types=["linear_attention", "full_attention"] * 2),
}
# transformers has no fused attention for these; for the last two it has one since 5.24.
EAGER = ("gemma2", "gpt_neo", "bloom", "mpt", "gpt_oss", "mimo_v2_flash")
EAGER += () if GPTJPreTrainedModel._supports_sdpa else ("gptj", "codegen")
SCANS = ("mamba", "mamba2")  # with a state and no attention


def config(name: str, fields: dict) -> ModelConfig:
    return ModelConfig({"model_type": name, "dtype": "bfloat16"} | fields, "config.json")


def measured(name: str, fields: dict, tokens: int, batch: int = 1, past: int = 0) -> int:
    """Bytes beyond weights and what remains (the cache) at the peak of a forward pass over `tokens` after `past`."""
    theirs = CONFIG_MAPPING[name](**fields)
    attention = "eager" if name in (*EAGER, *SCANS) else "sdpa"
    with torch.device("cpu" if name == "opt" else "meta"):  # in transformers 5.17 OPT's mask is read
        model = AutoModelForCausalLM.from_config(theirs, dtype=torch.bfloat16, attn_implementation=attention).eval()
        state = {"use_cache": True} if name in SCANS else {cache_argument(model): DynamicCache(config=theirs)}
        with torch.no_grad(), Live([*model.parameters(), *model.buffers()]) as live:
            for count in (past, tokens) if past else (tokens,):
                live.peak = live.now
                out = model(torch.zeros(batch, count, dtype=torch.int64), logits_to_keep=1, **state)
            return live.peak - live.now + out.logits.nbytes


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused_attention)


@pytest.mark.parametrize("name", MODELS)
def test_prefill_peak_is_within_5_percent_of_the_live_tensors(name):
    found = activations(config(name, MODELS[name]), 256)
    assert found.prefill == pytest.approx(measured(name, MODELS[name], 256), rel=0.05)
    assert found.prefill == found.moments[found.binding]


@pytest.mark.parametrize("shape", [dict(intermediate_size=8 * H), dict(intermediate_size=H, num_key_value_heads=8)])
@pytest.mark.parametrize("batch", [1, 3])
def test_prefill_peak_of_other_shapes_of_llama(shape, batch):
    fields = LLAMA | shape
    assert activations(config("llama", fields), 256, batch).prefill == pytest.approx(
        measured("llama", fields, 256, batch), rel=0.05
    )


def test_a_step_expands_the_latents_of_one_layer():
    fields = MODELS["deepseek_v3"]
    found = activations(config("deepseek_v3", fields), 1, context=4097)
    assert found.decode == pytest.approx(measured("deepseek_v3", fields, 1, past=4096), rel=0.05)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_appending_holds_a_layer_twice(name):
    """Keys in a layer that keeps all, keys and values in one that keeps a window: nothing else is as large in a step."""
    fields = MODELS[name]
    made, context = config(name, fields), 4097
    found = cache(made, context).append
    assert found == (min(context, 64) * 2 if name == "mistral" else context) * 4 * D * 2
    if name == "llama":
        assert found == pytest.approx(measured(name, fields, 1, past=context - 1), rel=0.05)


def test_logits_of_all_tokens():
    llama = config(
        "llama",
        dict(
            vocab_size=128256,
            num_hidden_layers=32,
            hidden_size=4096,
            intermediate_size=14336,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
    )
    found = activations(llama, 8192, logits="all")
    assert found.binding == "logits"
    assert found.prefill == 8192 * (128256 * (2 + 4) + 4096 * 2)  # 2.10 GB in 16 bit, 4.20 GB in float32
    assert activations(llama, 8192).moments["logits"] == 128256 * (2 + 8) + 4096 * 2


@pytest.mark.parametrize(
    ("method", "extra"),
    [
        ("nf4", 4096 * 14336 * 2 + 4096 * 14336 // 64 * 4),
        ("nf4-plain", 4096 * 14336 * 2),  # "the whole weight dequantized": 117 MB for Llama-3.1-8B
        ("fp4", 4096 * 14336 * 2 + 4096 * 14336 // 64 * 4),
        ("fp4-plain", 4096 * 14336 * 2),
        ("rtn", 4096 * 14336 * 2),
        ("mxfp4", 4096 * 14336 * 2),
        ("fp8", 4096 * 14336 * 2 + 64 * 4096 * 12),
        ("llm-int8", 64 * (4096 + 4 + 4 * 14336)),
    ],
)
def test_transients_of_quantized_products(method, extra):
    llama = config(
        "llama",
        dict(
            vocab_size=128256,
            num_hidden_layers=32,
            hidden_size=4096,
            intermediate_size=14336,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
    )
    found = activations(llama, 64, method=method)
    assert found.moments["up projection"] == 64 * (4 * 4096 + 2 * 14336) * 2 + extra
    assert found.prefill >= found.moments["up projection"]
    assert activations(llama, 8, method="nf4").moments["up projection"] == 8 * (4 * 4096 + 2 * 14336) * 2
    for name in ("rtn", "mxfp4"):
        assert activations(llama, 8, method=name).moments["up projection"] == 8 * (4 * 4096 + 2 * 14336) * 2


def test_vllm_takes_a_chunk_at_a_time():
    llama = config("llama", LLAMA)
    assert activations(llama, 100_000, 4, runtime="vllm").prefill == activations(llama, 8192).prefill
    assert activations(llama, 512, 2, runtime="vllm", chunk=256).prefill == activations(llama, 256).prefill


def test_float32_takes_twice_as_much():
    assert activations(config("llama", LLAMA), 512, dtype="float32").prefill == 2 * activations(config("llama", LLAMA), 512).prefill


def test_what_is_asked_wrongly():
    llama = config("llama", LLAMA)
    with pytest.raises(UsageError, match="method is 'int2', expected one of bfloat16"):
        activations(llama, 1, method="int2")
    with pytest.raises(UsageError, match="runtime is 'tgi'"):
        activations(llama, 1, runtime="tgi")
    with pytest.raises(UsageError, match="logits is 'some'"):
        activations(llama, 1, logits="some")


@pytest.mark.parametrize("projection", ["relu", "gated-gelu"])
@pytest.mark.parametrize("tokens", [64, 512])
def test_the_encoder_of_t5(projection, tokens):
    fields = dict(vocab_size=128, d_model=H, d_kv=D, d_ff=F, num_layers=4, num_heads=8, feed_forward_proj=projection)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(**fields)).to(torch.bfloat16).eval()
        with torch.no_grad(), Live([*model.parameters(), *model.buffers()]) as live:
            model.encoder(torch.zeros(1, tokens, dtype=torch.int64))
    t5 = config("t5", fields | {"is_encoder_decoder": True})
    assert activations(t5, tokens).prefill == pytest.approx(live.peak, rel=0.05)
