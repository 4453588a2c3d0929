"""Small configs of every family that is known from config.json alone, with the turns that their configs can take."""

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256, "n_positions": 64}
_MOE = SMALL | {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
_SHARED = _MOE | {"shared_expert_intermediate_size": 48}
_NEXT = _SHARED | {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
_LATENT = SMALL | {
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
_OPT = {
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 64,
}
_NEO = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "attention_types": [[["global", "local"], 1]],
}
_NEOX = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
_FALCON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}
_MPT = {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 256}
_T5 = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 256}
_VISION = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_HEAD = {"head_dim": 16}

# name -> (model_type, fields)
CASES = {
    "llama": ("llama", SMALL),
    "llama with biases": ("llama", SMALL | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 24}),
    "mistral, which has no biases": ("mistral", SMALL | {"attention_bias": True}),
    "mixtral": ("mixtral", SMALL | {"num_local_experts": 4}),
    "qwen2": ("qwen2", SMALL),
    "qwen2_moe": ("qwen2_moe", _SHARED),
    "qwen2_moe, some layers dense": (
        "qwen2_moe",
        _SHARED | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "qkv_bias": False},
    ),
    "qwen3": ("qwen3", SMALL),
    "qwen3_moe": ("qwen3_moe", _MOE),
    "qwen3_moe, a layer dense": ("qwen3_moe", _MOE | {"mlp_only_layers": [0], "attention_bias": True}),
    "qwen3_next": ("qwen3_next", _NEXT),
    "gemma": ("gemma", SMALL | _HEAD),
    "gemma2": ("gemma2", SMALL | _HEAD),
    "gemma3_text": ("gemma3_text", SMALL | _HEAD),
    "gemma3": ("gemma3", {"text_config": SMALL | _HEAD, "vision_config": _VISION | {"vision_use_head": False}}),
    "gemma3 with a vision head": ("gemma3", {"text_config": SMALL | _HEAD, "vision_config": _VISION}),
    "phi": ("phi", SMALL),
    "phi with norms of q and k": ("phi", SMALL | {"qk_layernorm": True}),
    "phi3": ("phi3", SMALL),
    "starcoder2": ("starcoder2", SMALL),
    "starcoder2 without biases": ("starcoder2", SMALL | {"use_bias": False, "tie_word_embeddings": False}),
    "gpt2": ("gpt2", _GPT),
    "gpt2 with its own MLP": ("gpt2", _GPT | {"n_inner": 100}),
    "gpt_neo": ("gpt_neo", _NEO),
    "gpt_neo with its own MLP": ("gpt_neo", _NEO | {"intermediate_size": 100}),
    "gpt_neox": ("gpt_neox", _NEOX),
    "gpt_neox without biases": ("gpt_neox", _NEOX | {"attention_bias": False}),
    "gptj": ("gptj", _GPT | {"rotary_dim": 8}),
    "opt": ("opt", _OPT),
    "opt-350m": ("opt", _OPT | {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "opt without biases and gains": ("opt", _OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "opt of Galactica's kind": ("opt", _OPT | {"_remove_final_layer_norm": True}),
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256}),
    "falcon-7b": ("falcon", _FALCON),
    "falcon-40b": ("falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon-rw": ("falcon", _FALCON | {"parallel_attn": False, "multi_query": False, "bias": True, "alibi": True}),
    "falcon2-11b": (
        "falcon",
        _FALCON
        | {
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "ffn_hidden_size": 100,
            "tie_word_embeddings": False,
        },
    ),
    "mpt": ("mpt", _MPT),
    "mpt, whose expansion is not read": ("mpt", _MPT | {"expansion_ratio": 2}),
    "deepseek_v2": ("deepseek_v2", _LATENT),
    "deepseek_v2-lite": ("deepseek_v2", _LATENT | {"q_lora_rank": None, "mlp_bias": True, "attention_bias": True}),
    "deepseek_v3": ("deepseek_v3", _LATENT),
    "gpt_oss": ("gpt_oss", SMALL | _HEAD | {"num_local_experts": 4}),
    "granite": ("granite", SMALL),
    "olmo": ("olmo", SMALL),
    "olmo, tied and without norms": ("olmo", SMALL | {"tie_word_embeddings": True}),
    "olmo2": ("olmo2", SMALL),
    "olmo3": ("olmo3", SMALL),
    "smollm3": ("smollm3", SMALL),
    "cohere": ("cohere", SMALL),
    "cohere with norms of q and k": ("cohere", SMALL | {"use_qk_norm": True, "attention_bias": True, "tie_word_embeddings": False}),
    "cohere2": ("cohere2", SMALL | _HEAD),
    "stablelm": ("stablelm", SMALL),
    "stablelm-2-12b": ("stablelm", SMALL | {"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True}),
    "t5": ("t5", _T5),
    "t5-v1.1": ("t5", _T5 | {"num_decoder_layers": 3, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
}


def llama(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocabulary: int) -> dict:
    """A published Llama's or Mistral's config."""
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }


def _opt(layers: int, hidden: int, heads: int) -> dict:
    return {
        "model_type": "opt",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "ffn_dim": 4 * hidden,
        "vocab_size": 50272,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": hidden,
    }


def _t5(hidden: int, ffn: int, heads: int, head_dim: int, projection: str, tied: bool) -> dict:
    return {
        "model_type": "t5",
        "is_encoder_decoder": True,
        "num_layers": 24,
        "d_model": hidden,
        "d_ff": ffn,
        "num_heads": heads,
        "d_kv": head_dim,
        "vocab_size": 32128,
        "feed_forward_proj": projection,
        "tie_word_embeddings": tied,
    }


LLAMAS = {
    "Llama-2-7B": llama(32, 4096, 11008, 32, 32, 32000),
    "Llama-2-13B": llama(40, 5120, 13824, 40, 40, 32000),
    "Llama-2-70B": llama(80, 8192, 28672, 64, 8, 32000),
    "Llama-3.1-8B": llama(32, 4096, 14336, 32, 8, 128256),
    "Llama-3.1-70B": llama(80, 8192, 28672, 64, 8, 128256),
    "Mistral-7B": llama(32, 4096, 14336, 32, 8, 32000),
}
# The models of Table 2 of LLM.int8(), arXiv:2208.07339, and OPT-6.7B.
PAPER = {
    "OPT-175B": _opt(96, 12288, 96),
    "BLOOM-176B": {"model_type": "bloom", "n_layer": 70, "hidden_size": 14336, "n_head": 112, "vocab_size": 250880},
    "OPT-66B": _opt(64, 9216, 72),
    "OPT-30B": _opt(48, 7168, 56),
    "OPT-13B": _opt(40, 5120, 40),
    "OPT-6.7B": _opt(32, 4096, 32),
    "GPT-J-6B": {
        "model_type": "gptj",
        "n_layer": 28,
        "n_embd": 4096,
        "n_head": 16,
        "n_positions": 2048,
        "rotary_dim": 64,
        "vocab_size": 50400,
        "n_inner": None,
        "tie_word_embeddings": False,
    },
    "GPT-2 XL": {"model_type": "gpt2", "n_layer": 48, "n_embd": 1600, "n_head": 25, "n_positions": 1024, "vocab_size": 50257},
    "T5-11B": _t5(1024, 65536, 128, 128, "relu", True),
    "T0": _t5(4096, 10240, 64, 64, "gated-gelu", False),
}
# Published configs, abridged to what bears on parameters; Gemma's text part holds as little as the published file's.
OTHERS = {
    "Mixtral-8x7B": {
        "model_type": "mixtral",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 61,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "vocab_size": 129280,
        "moe_intermediate_size": 2048,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "num_experts_per_tok": 8,
        "attention_bias": False,
        "num_nextn_predict_layers": 1,
        "tie_word_embeddings": False,
    },
    "gpt-oss-120b": {
        "model_type": "gpt_oss",
        "num_hidden_layers": 36,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 201088,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "Gemma-3-4B": {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "sliding_window": 1024,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    },
}
