"""Bytes of weights: published figures, the real tensors of loaded models, bitsandbytes' own, and what `quantize` plans."""

import math

import bitsandbytes.functional as bnb
import pytest
import torch

import qcli
from qcli.errors import UsageError
from qcli.memory.costs.weights import weights
from qcli.memory.model.config import ModelConfig
from qcli.memory.model.parameters import parameters
from qcli.memory.model.tensor_rules import parameter
from qcli.quantization.quantize import make_plan
from tests.memory.shapes import LLAMAS, PAPER
from tests.models import make_model

GB = 1e9


def of(raw: dict, method: str, dtype: str = "bfloat16", **options):
    return weights(parameters(ModelConfig(raw, "config.json")), method, dtype, **options)


# GB in bfloat16, LLM.int8(), NF4, NF4 with double quantization, the same with the rest in float32
TABLE = {
    "Llama-2-7B": (13.477, 7.006, 4.168, 3.866, 4.390),
    "Llama-2-13B": (26.032, 13.352, 7.793, 7.201, 7.858),
    "Llama-2-70B": (137.953, 69.529, 39.555, 36.363, 37.414),
    "Llama-3.1-8B": (16.061, 9.087, 6.028, 5.702, 7.804),
    "Llama-3.1-70B": (141.107, 72.683, 42.709, 39.517, 43.722),
    "Mistral-7B": (14.483, 7.510, 4.451, 4.125, 4.650),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_sizes_of_published_models(name):
    methods = [
        ("bfloat16", "bfloat16"),
        ("llm-int8", "bfloat16"),
        ("nf4-plain", "bfloat16"),
        ("nf4", "bfloat16"),
        ("nf4", "float32"),
    ]
    found = [of(LLAMAS[name], method, dtype).total / GB for method, dtype in methods]
    assert found == pytest.approx(TABLE[name], abs=0.0011)  # the table leaves out the codebooks, up to 0.6 MB


def test_every_byte_of_llama_2_7b():
    rest = 2 * 32000 * 4096 + (2 * 32 + 1) * 4096
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    n = 32 * sum(rows * columns for rows, columns in shapes)
    raw = LLAMAS["Llama-2-7B"]
    assert of(raw, "float16").total == 2 * (rest + n)
    assert of(raw, "llm-int8").total == 2 * rest + n + 32 * sum(4 * rows for rows, _ in shapes)
    assert of(raw, "nf4-plain").total == 2 * rest + n // 2 + n // 16 + 224 * 64
    assert of(raw, "nf4").total == of(raw, "fp4").total == 2 * rest + n // 2 + n // 64 + n // 4096 + 224 * (64 + 1024 + 4)
    assert of(raw, "nf4").largest == 2 * 11008 * 4096 and of(raw, "bfloat16").largest == 0


def test_double_quantization_costs_4_127_bits():
    config = ModelConfig(LLAMAS["Llama-2-70B"], "config.json")
    linears = [p for p in parameters(config) if p.quantizable]
    assert weights(linears, "nf4").bits_per_weight == pytest.approx(8 * 0.515869140625, abs=1e-4)
    assert weights(linears, "nf4-plain").bits_per_weight == pytest.approx(4.5, abs=1e-4)


# GB in 16 bit and in 8, every linear layer quantized as the paper's own code did, its rows' scales aside
PAPER_SIZES = {
    "OPT-175B": (349.21, 175.26),
    "BLOOM-176B": (352.49, 179.86),
    "OPT-66B": (131.44, 66.21),
    "OPT-30B": (59.95, 30.35),
    "OPT-13B": (25.71, 13.12),
    "OPT-6.7B": (13.32, 6.87),
    "GPT-J-6B": (12.10, 6.46),
    "GPT-2 XL": (3.12, 1.64),
    "T5-11B": (22.61, 11.34),
    "T0": (22.27, 11.40),
}


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_the_sizes_of_the_papers_models(name):
    found = parameters(ModelConfig(PAPER[name], name))
    scales = sum(4 * p.out_features for p in found if p.linear)
    half, byte = weights(found, "bfloat16").total, weights(found, "llm-int8", every_linear=True).total
    assert half / GB == pytest.approx(PAPER_SIZES[name][0], abs=0.0051)
    assert (byte - scales) / GB == pytest.approx(PAPER_SIZES[name][1], abs=0.0051)


def test_bloom_is_1_96_times_smaller_as_the_paper_says():
    half, byte = of(PAPER["BLOOM-176B"], "bfloat16").total, of(PAPER["BLOOM-176B"], "llm-int8").total
    assert round(half / byte, 2) == 1.96
    rows = 70 * (3 + 1 + 4 + 1) * 14336
    assert round(half / (byte - 4 * rows), 3) == 1.960


@pytest.mark.parametrize(("name", "in_float16"), [("T5-11B", 21.0), ("T0", 17.4)])
def test_t5_keeps_its_wo_out_of_quantization(name, in_float16):
    wo = sum(p.numel for p in parameters(ModelConfig(PAPER[name], name)) if p.keep_fp32)
    assert wo == 48 * PAPER[name]["d_model"] * PAPER[name]["d_ff"]
    assert of(PAPER[name], "llm-int8", "float16").total / GB == pytest.approx(in_float16, abs=0.05)
    assert of(PAPER[name], "llm-int8", "float16").total - of(PAPER[name], "llm-int8").total == 2 * wo
    assert of(PAPER[name], "float16").total - of(PAPER[name], "bfloat16").total == 2 * wo


@pytest.mark.parametrize("shape", [(96, 64), (7, 33), (300, 200)])
@pytest.mark.parametrize(("method", "double"), [("nf4", True), ("nf4-plain", False), ("fp4", True)])
def test_4_bits_take_what_bitsandbytes_takes(shape, method, double):
    kind = "fp4" if method == "fp4" else "nf4"
    packed, state = bnb.quantize_4bit(torch.randn(shape), blocksize=64, quant_type=kind, compress_statistics=double)
    theirs = [packed, state.absmax, state.code]
    theirs += [state.state2.absmax, state.state2.code, state.offset] if double else []
    config = ModelConfig({"model_type": "llama"}, "config.json")
    ours = weights([parameter("model.layers.0.mlp.up_proj.weight", shape, config)], method)
    assert ours.total == sum(t.numel() * t.element_size() for t in theirs)
    assert ours.allocated == sum(math.ceil(t.numel() * t.element_size() / 512) * 512 for t in theirs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5", "opt"])
def test_the_bytes_are_those_that_quantize_plans_and_a_loaded_model_has(name, tmp_path):
    made = make_model(name, tmp_path / "model")
    config = ModelConfig(made.config.to_dict(), "config.json")
    found = parameters(config)
    assert weights(found, "bfloat16").total == sum(p.numel() * p.element_size() for p in made.parameters())
    for method in ("nf4", "llm-int8"):
        plan = make_plan(str(tmp_path / "model"), tmp_path / "out", method=method)
        assert weights(found, method).stored == sum(work.output_bytes for work in plan.work)
    model, _ = qcli.load(str(tmp_path / "model"), bits=8, device="cpu")
    held = {t.data_ptr(): t.numel() * t.element_size() for n, t in model.state_dict().items() if "format" not in n}
    assert weights(found, "llm-int8").total == sum(held.values())


def test_kinds_add_up_and_formulas_name_every_byte():
    found = of(LLAMAS["Llama-3.1-8B"], "nf4")
    assert sum(found.by_kind.values()) == found.total < found.stored and found.total <= found.allocated
    assert found.by_kind["embedding"] == found.by_kind["head"] == 2 * 128256 * 4096
    assert found.bits_per_weight == pytest.approx(8 * found.total / 8_030_261_248)
    assert any("attention, ffn: 6,979,321,856 parameters in nf4" in line for line in found.formula)
    assert any(
        "embedding, norm, head: 1,050,939,392 parameters in bfloat16, 2 bytes each: 2.10 GB" in line for line in found.formula
    )


def test_experts_stay_16_bit_and_are_the_transient_of_a_mixture():
    raw = {
        "model_type": "mixtral",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "num_local_experts": 4,
        "tie_word_embeddings": False,
    }
    found = of(raw, "nf4")
    assert found.by_kind["experts"] == 2 * 2 * 4 * 3 * 64 * 128
    assert found.largest == of(raw, "bfloat16").largest == 2 * 4 * 2 * 128 * 64


@pytest.mark.parametrize(("method", "dtype"), [("int3", "bfloat16"), ("nf4", "int8")])
def test_unknown_words_are_refused(method, dtype):
    with pytest.raises(UsageError, match="expected one of"):
        of(LLAMAS["Llama-2-7B"], method, dtype)
