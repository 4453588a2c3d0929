"""What names of tensors and modules say."""

import pytest

from qcli.checkpoint.names import (
    Place,
    gain_of,
    in_attention,
    in_ffn,
    is_down_projection,
    layer_counts,
    may_be_linear,
    module_kind,
    place,
)


@pytest.mark.parametrize(
    "module, expected",
    [
        ("model.layers.12.mlp.down_proj", Place("model.layers", 12, "mlp.down_proj")),
        ("transformer.h.0.attn.c_attn", Place("transformer.h", 0, "attn.c_attn")),
        ("decoder.block.3.layer.1.EncDecAttention.q", Place("decoder.block", 3, "layer.#.EncDecAttention.q")),
        ("model.layers.2.mlp.experts.15.w2", Place("model.layers", 2, "mlp.experts.#.w2")),
        ("4.fc1", Place("", 4, "fc1")),
        ("lm_head", Place("", None, "lm_head")),
    ],
)
def test_places(module, expected):
    assert place(module) == expected


def test_layers_are_counted_by_stack():
    names = ["encoder.block.0.q", "encoder.block.5.layer.11.q", "decoder.block.1.q", "lm_head"]
    assert layer_counts(names) == {"encoder.block": 6, "decoder.block": 2}


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
        "transformer.h.0.ln_1.weight",
        "transformer.ln_f.weight",
        "bert.encoder.layer.0.output.LayerNorm.gamma",
        "encoder.block.0.layer.0.layer_norm.weight",
        "h.3.norm_1.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "h.1.ln_attn.weight",
        "backbone.norm_f.weight",
    ],
)
def test_gains_of_norms(name):
    assert gain_of(name) == name.rpartition(".")[0]


@pytest.mark.parametrize(
    "name", ["model.norm.bias", "model.layers.0.mlp.up_proj.weight", "embed_tokens.weight", "h.0.lnx.weight", "norm"]
)
def test_no_gains_of_norms(name):
    assert gain_of(name) is None


@pytest.mark.parametrize(
    "module, expected",
    [
        ("model.layers.0.mlp.down_proj", True),
        ("model.layers.0.fc2", True),
        ("h.0.mlp.dense_4h_to_h", True),
        ("transformer.h.0.mlp.c_proj", True),
        ("h.0.mlp.fc_out", True),
        ("block.0.layer.1.DenseReluDense.wo", True),
        ("bert.encoder.layer.0.output.dense", True),
        ("model.layers.0.block_sparse_moe.experts.3.w2", True),
        ("transformer.h.0.attn.c_proj", False),
        ("bert.encoder.layer.0.attention.output.dense", False),
        ("model.layers.0.attention.wo", False),
        ("model.layers.0.mlp.up_proj", False),
        ("model.layers.0.fc1", False),
    ],
)
def test_down_projections(module, expected):
    assert is_down_projection(module) is expected


@pytest.mark.parametrize(
    "module, expected",
    [
        ("model.layers.0.self_attn.q_proj", True),
        ("layers.0.attention.wo", True),
        ("encoder.layer.0.attention.output", True),
        ("h.0.mlp.shared", True),
        ("model.layers.0.mlp.gate_proj", True),
        ("output", False),
        ("shared", False),
        ("lm_head", False),
        ("tok_embeddings", False),
        ("transformer.wte", False),
        ("token_emb", False),
        ("visual.patch_embed", False),
        ("layers.0.mlp.gate", False),
        ("layers.0.ffn.router", False),
        ("layers.0.attn.q_norm", False),
        ("ln_f", False),
        ("layers.0.conv1d", False),
        ("block.0.layer.0.SelfAttention.relative_attention_bias", False),
    ],
)
def test_what_may_be_linear(module, expected):
    assert may_be_linear(module) is expected


@pytest.mark.parametrize(
    "path, attention, ffn",
    [
        ("self_attn.q_proj", True, False),
        ("attn.c_proj", True, False),
        ("attention.dense", True, False),
        ("mlp.down_proj", False, True),
        ("fc1", False, True),
        ("block_sparse_moe.experts.*.w2", False, True),
        ("mlp.attention_gate", False, True),
        ("attention.mlp", True, False),
        ("mixer.in_proj", False, False),
    ],
)
def test_attention_and_ffn(path, attention, ffn):
    assert (in_attention(path), in_ffn(path)) == (attention, ffn)


def test_kinds_of_tables():
    names = ["model.layers.3.mlp.experts.7.w2.weight", "model.norm.weight", "h.0.attn.bias", "model.embed_tokens.weight", "scale"]
    assert [module_kind(name) for name in names] == ["w2", "norm", "attn", "embed_tokens", "scale"]
