"""Decoders in the manner of Llama: grouped attention with rotary embeddings and a gated MLP. They differ in biases and norms."""

from dataclasses import dataclass

from qcli.memory.config import ModelConfig
from qcli.memory.families._shapes import Shapes, attention, gated_mlp, norms

_BEFORE = ("input_layernorm", "post_attention_layernorm")
_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class _Variant:
    """bias: the fields that switch biases on (attention, mlp), or True for q, k and v alone. qk_norm: over a head or over
    all heads together. norms: those of a block; `norm_bias` makes them LayerNorms with a bias."""

    attention_bias: str | bool | None = None
    mlp_bias: str | None = None
    norms: tuple[str, ...] = _BEFORE
    norm_bias: bool = False
    qk_norm: str | None = None
    final_norm: bool = True


_VARIANTS = {
    "llama": _Variant("attention_bias", "mlp_bias"),
    "mistral": _Variant(),
    "qwen2": _Variant(attention_bias=True),
    "qwen3": _Variant("attention_bias", qk_norm="head"),
    "granite": _Variant("attention_bias", "mlp_bias"),
    "smollm3": _Variant("attention_bias", "mlp_bias"),
    "olmo": _Variant("attention_bias", norms=(), final_norm=False),
    "olmo2": _Variant("attention_bias", norms=_AFTER, qk_norm="all"),
    "olmo3": _Variant("attention_bias", norms=_AFTER, qk_norm="all"),
    "cohere": _Variant("attention_bias", norms=_BEFORE[:1], qk_norm="optional"),
    "cohere2": _Variant("attention_bias", norms=_BEFORE[:1]),
    "stablelm": _Variant(norm_bias=True),
}
MODEL_TYPES = tuple(_VARIANTS)


def shapes(config: ModelConfig, model: Shapes) -> None:
    variant = _VARIANTS[config.model_type]
    hidden, width, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    only_qkv = variant.attention_bias is True or (
        config.model_type == "stablelm" and config.get("use_qkv_bias", default=False)
    )
    bias = only_qkv or bool(variant.attention_bias and config.get(variant.attention_bias, default=False))
    mlp_bias = bool(variant.mlp_bias and config.get(variant.mlp_bias, default=False))
    block_norms = variant.norms
    if config.model_type == "stablelm" and config.get("use_parallel_residual", default=False):
        block_norms = _BEFORE[:1]

    model.embedding("model.embed_tokens", config.vocab_size, hidden)
    for i in range(config.layers):
        at = f"model.layers.{i}"
        attention(model, f"{at}.self_attn", config, bias=bias, output_bias=bias and not only_qkv)
        for name, heads in (("q", config.heads), ("k", config.kv_heads)):
            if variant.qk_norm == "head":
                model.norm(f"{at}.self_attn.{name}_norm", head_dim)
            elif variant.qk_norm == "all":
                model.norm(f"{at}.self_attn.{name}_norm", heads * head_dim)
            elif variant.qk_norm == "optional" and config.get("use_qk_norm", default=False):
                model.tensor(f"{at}.self_attn.{name}_norm.weight", heads, head_dim)
            elif config.model_type == "stablelm" and config.get("qk_layernorm", default=False):
                norms(model, f"{at}.self_attn.{name}_layernorm.norms", map(str, range(heads)), head_dim)
        gated_mlp(model, f"{at}.mlp", hidden, width, mlp_bias)
        norms(model, at, block_norms, hidden, variant.norm_bias)
    if variant.final_norm:
        model.norm("model.norm", hidden, variant.norm_bias)
    model.head(config, hidden)
