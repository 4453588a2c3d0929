"""Decoders like Llama: grouped attention with rotary embeddings, and a gated MLP. They differ in biases and norms."""

from dataclasses import dataclass

from qcli.memory.model.config import ModelConfig
from qcli.memory.model.families._shapes import Shapes, attention, gated_mlp, norms

_BEFORE = ("input_layernorm", "post_attention_layernorm")
_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class _Variant:
    """attention_bias, mlp_bias: whether these fields of the config are read.
    norms: those of a block. An empty tuple means that no norm has a gain, the last one included.
    qk_norm: norms of queries and keys, over a "head", over "all" heads, or one for "each" head where the field use_qk_norm is set.
    """

    attention_bias: bool = True
    mlp_bias: bool = False
    norms: tuple[str, ...] = _BEFORE
    qk_norm: str | None = None


_VARIANTS = {
    "llama": _Variant(mlp_bias=True),
    "mistral": _Variant(attention_bias=False),
    "qwen2": _Variant(attention_bias=False),
    "qwen3": _Variant(qk_norm="head"),
    "granite": _Variant(mlp_bias=True),
    "smollm3": _Variant(mlp_bias=True),
    "olmo": _Variant(norms=()),
    "olmo2": _Variant(norms=_AFTER, qk_norm="all"),
    "olmo3": _Variant(norms=_AFTER, qk_norm="all"),
    "cohere": _Variant(norms=_BEFORE[:1], qk_norm="each"),
    "cohere2": _Variant(norms=_BEFORE[:1]),
}
MODEL_TYPES = tuple(_VARIANTS)


def shapes(config: ModelConfig, model: Shapes) -> None:
    variant, hidden = _VARIANTS[config.model_type], config.hidden_size
    bias = variant.attention_bias and config.get("attention_bias", default=False)
    mlp_bias = variant.mlp_bias and config.get("mlp_bias", default=False)
    qkv_bias = bias or config.model_type == "qwen2"

    model.embedding("model.embed_tokens", config.vocab_size, hidden)
    for i in range(config.layers):
        at = f"model.layers.{i}"
        attention(model, f"{at}.self_attn", config, bias=qkv_bias, output_bias=bias)
        _qk_norms(model, f"{at}.self_attn", config, variant.qk_norm)
        gated_mlp(model, f"{at}.mlp", hidden, config.intermediate_size, mlp_bias)
        norms(model, at, variant.norms, hidden)
    if variant.norms:
        model.norm("model.norm", hidden)
    model.head(config, hidden)


def _qk_norms(model: Shapes, at: str, config: ModelConfig, over: str | None) -> None:
    for name, heads in (("q_norm", config.heads), ("k_norm", config.kv_heads)):
        if over == "head":
            model.norm(f"{at}.{name}", config.head_dim)
        elif over == "all":
            model.norm(f"{at}.{name}", heads * config.head_dim)
        elif over == "each" and config.get("use_qk_norm", default=False):
            model.tensor(f"{at}.{name}.weight", heads, config.head_dim)
