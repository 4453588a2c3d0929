"""Mixture-of-experts decoders: Mixtral, Qwen's, and Qwen3-Next. Most layers of Qwen3-Next are gated DeltaNets."""

from qcli.memory.model.config import ModelConfig
from qcli.memory.model.families._shapes import Shapes, attention, fused_experts, gated_mlp, norms

MODEL_TYPES = ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next")


def shapes(config: ModelConfig, model: Shapes) -> None:
    hidden, kind = config.hidden_size, config.model_type
    model.embedding("model.embed_tokens", config.vocab_size, hidden)
    for i in range(config.layers):
        at = f"model.layers.{i}"
        if kind == "qwen3_next" and config.layer_types[i] == "linear_attention":
            _delta_net(model, f"{at}.linear_attn", config)
        else:
            _attention(model, f"{at}.self_attn", config)
        if not config.is_moe_layer(i):
            gated_mlp(model, f"{at}.mlp", hidden, config.intermediate_size)
        else:
            width = config.intermediate_size if kind == "mixtral" else config.moe_intermediate_size
            fused_experts(model, f"{at}.mlp", config.num_experts, hidden, width)
            if kind in ("qwen2_moe", "qwen3_next"):
                shared = config.integer("shared_expert_intermediate_size")
                gated_mlp(model, f"{at}.mlp.shared_expert", hidden, shared)
                model.linear(f"{at}.mlp.shared_expert_gate", 1, hidden)
        norms(model, at, ("input_layernorm", "post_attention_layernorm"), hidden)
    model.norm("model.norm", hidden)
    model.head(config, hidden)


def _attention(model: Shapes, at: str, config: ModelConfig) -> None:
    if config.model_type == "qwen2_moe":
        attention(model, at, config, bias=config.get("qkv_bias", default=True), output_bias=False)
    elif config.model_type == "mixtral":
        attention(model, at, config)
    else:
        gated = config.model_type == "qwen3_next"
        attention(model, at, config, bias=config.get("attention_bias", default=False), gated=gated)
        norms(model, at, ("q_norm", "k_norm"), config.head_dim)


def _delta_net(model: Shapes, at: str, config: ModelConfig) -> None:
    value_heads, value_dim = config.integer("linear_num_value_heads"), config.integer("linear_value_head_dim")
    keys = config.integer("linear_num_key_heads") * config.integer("linear_key_head_dim")
    values = value_heads * value_dim
    model.tensor(f"{at}.dt_bias", value_heads)
    model.tensor(f"{at}.A_log", value_heads)
    model.tensor(f"{at}.conv1d.weight", 2 * keys + values, 1, config.integer("linear_conv_kernel_dim"))
    model.linear(f"{at}.in_proj_qkvz", 2 * keys + 2 * values, config.hidden_size)
    model.linear(f"{at}.in_proj_ba", 2 * value_heads, config.hidden_size)
    model.norm(f"{at}.norm", value_dim)
    model.linear(f"{at}.out_proj", config.hidden_size, values)
