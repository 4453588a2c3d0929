"""Parameters from headers: saved models, quantized ones, and the layouts of other quantizers."""

import math
from types import SimpleNamespace

import pytest

import qcli
from qcli.checkpoint.dtypes import DTYPE_BITS
from qcli.checkpoint.safetensors_file import TensorInfo
from qcli.checkpoint.source import open_source
from qcli.errors import UsageError
from qcli.memory.costs.weights import weights
from qcli.memory.model.config import ModelConfig
from qcli.memory.model.parameters import parameters, parameters_of
from tests.models import ARCHITECTURES, make_model

LAYER = "model.layers.0."
CONFIG = {
    "model_type": "newest",
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "tie_word_embeddings": False,
}
OUTSIDE = {
    "model.embed_tokens.weight": ("BF16", (256, 64)),
    "model.norm.weight": ("BF16", (64,)),
    "lm_head.weight": ("BF16", (256, 64)),
}


def headers(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> SimpleNamespace:
    """A Source's face as far as headers go."""
    infos = {n: TensorInfo("model.safetensors", n, d, s, 0, math.prod(s) * DTYPE_BITS[d] // 8) for n, (d, s) in tensors.items()}
    return SimpleNamespace(tensors=infos)


def read(tensors, **fields) -> tuple[dict, ModelConfig]:
    config = ModelConfig(CONFIG | fields, "config.json")
    return {p.name: p for p in parameters_of(headers(tensors), config)}, config


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_headers_say_what_the_config_says(name, tmp_path):
    model = make_model(name, tmp_path / "model")
    source = open_source(str(tmp_path / "model"))
    config = ModelConfig(source.config, "config.json")
    found, derived = parameters_of(source, config), parameters(config)
    assert sum(p.numel for p in found) == sum(p.numel() for p in model.parameters())
    for method in ("bfloat16", "float16", "llm-int8", "nf4"):
        ours, theirs = weights(found, method), weights(derived, method)
        assert (ours.by_kind, ours.stored, ours.total) == (theirs.by_kind, theirs.stored, theirs.total)
        assert ours.largest == theirs.largest
    assert sum(p.quantizable for p in found) == ARCHITECTURES[name][2]
    assert all(p.scheme is None and p.stored == 2 * p.numel for p in found)


@pytest.mark.parametrize("method", ["nf4", "llm-int8"])
def test_a_bitsandbytes_checkpoint_counts_as_the_model_it_stands_for(method, tmp_path):
    model = make_model("llama", tmp_path / "model")
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out", method=method)
    source = open_source(str(tmp_path / "out"))
    config = ModelConfig(source.config, "config.json")
    found = parameters_of(source, config)
    assert {p.name: p.shape for p in found} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert sum(p.scheme == method for p in found) == 14
    sizes = {name: info.nbytes for name, info in source.tensors.items()}
    assert sum(sizes.values()) == weights(parameters(config), method).stored
    beside = sum(size for name, size in sizes.items() if "quant_state" in name or name.endswith("weight_format"))
    assert beside and weights(found, "stored").total == sum(sizes.values()) - beside  # neither takes memory of a device


def test_a_4_bit_weight_of_an_unknown_family_has_its_count():
    codes = {
        f"{LAYER}mlp.up_proj.weight": ("U8", (64 * 96 // 2, 1)),
        f"{LAYER}mlp.up_proj.weight.absmax": ("U8", (96,)),
        f"{LAYER}mlp.up_proj.weight.quant_state.bitsandbytes__fp4": ("U8", (100,)),
    }
    found, _ = read(OUTSIDE | codes, quantization_config={"quant_method": "bitsandbytes"})
    weight = found[f"{LAYER}mlp.up_proj.weight"]
    assert (weight.numel, weight.stored, weight.scheme) == (64 * 96, 64 * 96 // 2 + 96, "fp4-plain")


PACKED = {
    "gptq": (
        {"bits": 4, "group_size": 32},
        {"qweight": ("I32", (8, 96)), "qzeros": ("I32", (2, 12)), "scales": ("F16", (2, 96)), "g_idx": ("I32", (64,))},
    ),
    "gptq of 3 bits": ({"bits": 3}, {"qweight": ("I32", (6, 96)), "scales": ("F16", (2, 96))}),
    "awq": ({"bits": 4, "group_size": 32}, {"qweight": ("I32", (64, 12)), "qzeros": ("I32", (2, 12)), "scales": ("F16", (2, 96))}),
    "fp8": ({}, {"weight": ("F8_E4M3", (96, 64)), "weight_scale_inv": ("F32", (1, 1))}),
    "compressed-tensors": (
        {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}},
        {"weight_packed": ("I32", (96, 16)), "weight_scale": ("BF16", (96, 2)), "weight_shape": ("I64", (2,))},
    ),
    "compressed-tensors NVFP4": (
        {"config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
        {"weight_packed": ("U8", (96, 32)), "weight_scale": ("F8_E4M3", (96, 4)), "weight_global_scale": ("F32", (1,))},
    ),
    "modelopt": (
        {},
        {
            "weight": ("U8", (96, 32)),
            "weight_scale": ("F8_E4M3", (96, 4)),
            "weight_scale_2": ("F32", ()),
            "input_scale": ("F32", ()),
        },
    ),
    "a dtype of 4 bits": ({}, {"weight": ("F4", (96, 64)), "weight_scale": ("F8_E8M0", (96, 2))}),
    "a dtype of 6 bits": ({}, {"weight": ("F6_E2M3", (96, 64))}),
}


@pytest.mark.parametrize("case", PACKED)
def test_packed_weights_have_their_shape_and_their_bytes(case):
    quantization, tensors = PACKED[case]
    module = f"{LAYER}mlp.up_proj"
    config = {"quant_method": case.split()[0], **quantization}
    found, _ = read(OUTSIDE | {f"{module}.{end}": spec for end, spec in tensors.items()}, quantization_config=config)
    assert set(found) == set(OUTSIDE) | {f"{module}.weight"}
    weight = found[f"{module}.weight"]
    assert (weight.shape, weight.kind, weight.linear) == ((96, 64), "ffn", True) and weight.scheme is not None
    held = {name: spec for name, spec in tensors.items() if name != "weight_shape"}  # which a loaded module does not keep
    size = sum(math.prod(shape) * DTYPE_BITS[dtype] // 8 for dtype, shape in held.values())
    assert weight.stored == size
    assert weights(list(found.values()), "stored").total == size + 2 * (2 * 256 * 64 + 64)
    assert weights(list(found.values()), "stored", "float32").total == size + 4 * (2 * 256 * 64 + 64)


def test_mxfp4_experts_stand_for_two_weights_a_byte():
    at = f"{LAYER}mlp.experts.gate_up_proj"
    tensors = {f"{at}_blocks": ("U8", (4, 128, 2, 16)), f"{at}_scales": ("U8", (4, 128, 2)), f"{at}_bias": ("BF16", (4, 128))}
    found, _ = read(OUTSIDE | tensors, quantization_config={"quant_method": "mxfp4"})
    experts = found[at]
    assert experts.shape == (4, 128, 64) and experts.kind == "experts" and not experts.quantizable
    assert 8 * experts.stored / experts.numel == 4.25


def test_bits_that_no_format_has_are_refused():
    packed = {f"{LAYER}mlp.up_proj.qweight": ("I32", (8, 96))}
    with pytest.raises(UsageError, match="5 bits, expected 2, 3, 4 or 8"):
        read(OUTSIDE | packed, quantization_config={"quant_method": "gptq", "bits": 5})


def test_layers_that_predict_further_tokens_are_left_out_and_said():
    extra = {"model.layers.1.eh_proj.weight": ("BF16", (64, 128)), "mtp.fc.weight": ("BF16", (64, 128))}
    kept = {f"{LAYER}mlp.up_proj.weight": ("BF16", (96, 64))}
    found, config = read(OUTSIDE | kept | extra, num_nextn_predict_layers=1)
    assert set(found) == set(OUTSIDE) | set(kept)
    assert any("32.77 kB of layers that predict" in sentence for sentence in config.assumed)


def test_a_stored_head_counts_once_where_it_is_tied():
    found, config = read(OUTSIDE, tie_word_embeddings=True)
    assert "lm_head.weight" not in found and not config.assumed
    found, config = read(OUTSIDE)
    assert found["lm_head.weight"].kind == "head" and not config.assumed
    headless = {name: spec for name, spec in OUTSIDE.items() if name != "lm_head.weight"}
    found, config = read(headless)
    assert set(found) == set(headless) and any("No output head" in sentence for sentence in config.assumed)


def test_second_copies_of_a_shared_embedding_and_old_buffers_are_left_out():
    shared = {
        f"{name}.weight": ("F32", (256, 64)) for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    }
    found, _ = read(shared, tie_word_embeddings=True)
    assert set(found) == {"shared.weight"}
    old = {
        "h.0.attn.bias": ("F32", (1, 1, 8, 8)),
        "h.0.attn.masked_bias": ("F32", ()),
        "h.0.attn.rotary_emb.inv_freq": ("F32", (8,)),
        "h.0.attn.c_attn.bias": ("F32", (192,)),
    }
    found, _ = read(OUTSIDE | old)
    assert set(found) == {*OUTSIDE, "h.0.attn.c_attn.bias"}
