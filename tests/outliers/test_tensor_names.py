import pytest

from qcli.outliers.tensor_names import Place, gain_of, is_down_projection, layer_counts, place


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
