"""DeepSeek V2 and V3: latent attention, dense layers first, then routed and shared experts."""

from qcli.memory.model.config import ModelConfig
from qcli.memory.model.families._shapes import Shapes, fused_experts, gated_mlp, norms

MODEL_TYPES = ("deepseek_v2", "deepseek_v3")


def shapes(config: ModelConfig, model: Shapes) -> None:
    hidden = config.hidden_size
    mlp_bias = config.model_type == "deepseek_v2" and config.get("mlp_bias", default=False)
    model.embedding("model.embed_tokens", config.vocab_size, hidden)
    for i in range(config.layers):
        at = f"model.layers.{i}"
        _latent_attention(model, f"{at}.self_attn", config)
        if i < config.integer("first_k_dense_replace", default=0):
            gated_mlp(model, f"{at}.mlp", hidden, config.intermediate_size, mlp_bias)
        else:
            width = config.moe_intermediate_size
            fused_experts(model, f"{at}.mlp", config.num_experts, hidden, width)
            gated_mlp(model, f"{at}.mlp.shared_experts", hidden, width * config.integer("n_shared_experts"), mlp_bias)
        norms(model, at, ("input_layernorm", "post_attention_layernorm"), hidden)
    model.norm("model.norm", hidden)
    model.head(config, hidden)


def _latent_attention(model: Shapes, at: str, config: ModelConfig) -> None:
    hidden, heads, bias = config.hidden_size, config.heads, config.get("attention_bias", default=False)
    nope, rope = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
    value, latent = config.integer("v_head_dim"), config.integer("kv_lora_rank")
    rank = config.integer("q_lora_rank", default=None)
    if rank is None:
        model.linear(f"{at}.q_proj", heads * (nope + rope), hidden)
    else:
        model.linear(f"{at}.q_a_proj", rank, hidden, bias)
        model.norm(f"{at}.q_a_layernorm", rank)
        model.linear(f"{at}.q_b_proj", heads * (nope + rope), rank)
    model.linear(f"{at}.kv_a_proj_with_mqa", latent + rope, hidden, bias)
    model.norm(f"{at}.kv_a_layernorm", latent)
    model.linear(f"{at}.kv_b_proj", heads * (nope + value), latent)
    model.linear(f"{at}.o_proj", hidden, heads * value, bias)
