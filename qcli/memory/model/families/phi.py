"""Phi, Phi-3 and StarCoder2."""

from qcli.memory.model.config import ModelConfig
from qcli.memory.model.families._shapes import Shapes, attention, norms

MODEL_TYPES = ("phi", "phi3", "starcoder2")


def shapes(config: ModelConfig, model: Shapes) -> None:
    hidden = config.hidden_size
    biased = config.model_type != "phi3"
    model.embedding("model.embed_tokens", config.vocab_size, hidden)
    for i in range(config.layers):
        at = f"model.layers.{i}"
        _BLOCKS[config.model_type](model, at, config)
        first = 1 if config.model_type == "phi" else 2  # Phi's attention and MLP share one norm
        norms(model, at, ("input_layernorm", "post_attention_layernorm")[:first], hidden, bias=biased)
    model.norm("model.final_layernorm" if config.model_type == "phi" else "model.norm", hidden, bias=biased)
    model.head(config, hidden, bias=config.model_type == "phi")


def _phi(model: Shapes, at: str, config: ModelConfig) -> None:
    attention(model, f"{at}.self_attn", config, bias=True, output="dense")
    if config.get("qk_layernorm", default=False):
        norms(model, f"{at}.self_attn", ("q_layernorm", "k_layernorm"), config.hidden_size // config.heads, bias=True)
    model.linear(f"{at}.mlp.fc1", config.intermediate_size, config.hidden_size, bias=True)
    model.linear(f"{at}.mlp.fc2", config.hidden_size, config.intermediate_size, bias=True)


def _phi3(model: Shapes, at: str, config: ModelConfig) -> None:
    hidden, width, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    model.linear(f"{at}.self_attn.o_proj", hidden, config.heads * head_dim)
    model.linear(f"{at}.self_attn.qkv_proj", (config.heads + 2 * config.kv_heads) * head_dim, hidden)
    model.linear(f"{at}.mlp.gate_up_proj", 2 * width, hidden)
    model.linear(f"{at}.mlp.down_proj", hidden, width)


def _starcoder2(model: Shapes, at: str, config: ModelConfig) -> None:
    bias = config.get("use_bias", default=True)
    attention(model, f"{at}.self_attn", config, bias=bias)
    model.linear(f"{at}.mlp.c_fc", config.intermediate_size, config.hidden_size, bias)
    model.linear(f"{at}.mlp.c_proj", config.hidden_size, config.intermediate_size, bias)


_BLOCKS = {"phi": _phi, "phi3": _phi3, "starcoder2": _starcoder2}
