"""BLOOM, Falcon and MPT: one matrix for query, key and value, and in most of them ALiBi."""

from qcli.memory.model.config import ModelConfig
from qcli.memory.model.families._shapes import Shapes, norms

MODEL_TYPES = ("bloom", "falcon", "mpt")


def shapes(config: ModelConfig, model: Shapes) -> None:
    {"bloom": _bloom, "falcon": _falcon, "mpt": _mpt}[config.model_type](config, model)
    model.head(config, config.hidden_size)


def _bloom(config: ModelConfig, model: Shapes) -> None:
    hidden = config.hidden_size
    model.embedding("transformer.word_embeddings", config.vocab_size, hidden)
    model.norm("transformer.word_embeddings_layernorm", hidden, bias=True)
    for i in range(config.layers):
        at = f"transformer.h.{i}"
        _fused_block(model, at, hidden, 3 * hidden, 4 * hidden, bias=True)
        norms(model, at, ("input_layernorm", "post_attention_layernorm"), hidden, bias=True)
    model.norm("transformer.ln_f", hidden, bias=True)


def _falcon(config: ModelConfig, model: Shapes) -> None:
    hidden, heads = config.hidden_size, config.heads
    head_dim, grouped = hidden // heads, config.get("new_decoder_architecture", default=False)
    kv_heads = config.integer("num_kv_heads", default=heads) if grouped else config.kv_heads
    parallel_norms = config.get("num_ln_in_parallel_attn", default=2 if grouped else 1)
    if not config.get("parallel_attn", default=True):
        names = ("post_attention_layernorm", "input_layernorm")
    else:
        names = ("ln_attn", "ln_mlp") if parallel_norms == 2 else ("input_layernorm",)
    width = config.integer("ffn_hidden_size", default=None) or 4 * hidden
    model.embedding("transformer.word_embeddings", config.vocab_size, hidden)
    for i in range(config.layers):
        at = f"transformer.h.{i}"
        qkv = (heads + 2 * kv_heads) * head_dim
        _fused_block(model, at, hidden, qkv, width, bias=bool(config.get("bias", default=False)))
        norms(model, at, names, hidden, bias=True)
    model.norm("transformer.ln_f", hidden, bias=True)


def _fused_block(model: Shapes, at: str, hidden: int, qkv: int, width: int, bias: bool) -> None:
    model.linear(f"{at}.self_attention.query_key_value", qkv, hidden, bias)
    model.linear(f"{at}.self_attention.dense", hidden, hidden, bias)
    model.linear(f"{at}.mlp.dense_h_to_4h", width, hidden, bias)
    model.linear(f"{at}.mlp.dense_4h_to_h", hidden, width, bias)


def _mpt(config: ModelConfig, model: Shapes) -> None:
    hidden = config.hidden_size
    model.embedding("transformer.wte", config.vocab_size, hidden)
    for i in range(config.layers):
        at = f"transformer.blocks.{i}"
        model.linear(f"{at}.attn.Wqkv", 3 * hidden, hidden)
        model.linear(f"{at}.attn.out_proj", hidden, hidden)
        model.linear(f"{at}.ffn.up_proj", 4 * hidden, hidden)  # transformers reads no expansion_ratio
        model.linear(f"{at}.ffn.down_proj", hidden, 4 * hidden)
        norms(model, at, ("norm_1", "norm_2"), hidden)
    model.norm("transformer.norm_f", hidden)
