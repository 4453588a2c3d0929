"""A quantized checkpoint's bytes from its config.json alone, against published sizes and a plan's own bytes."""

import pytest

from qcli.errors import UsageError
from qcli.memory.costs.weights import weights
from qcli.memory.model.config import ModelConfig
from qcli.memory.model.parameters import parameters
from qcli.memory.model.stored import as_stored

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
LINEAR = 6_979_321_856  # its parameters in linear layers
GPT_OSS_120B = {
    "model_type": "gpt_oss",
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "vocab_size": 201088,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "max_position_embeddings": 131072,
}


def total(raw: dict, **quantization) -> int:
    config = ModelConfig(raw | {"quantization_config": quantization}, "config.json")
    return weights(as_stored(parameters(config), config), "stored", "bfloat16").total


def test_mxfp4_is_the_size_of_gpt_oss_as_published():
    # 60.8 GiB, the checkpoint size in the model card (arXiv:2508.10925, table 1)
    assert total(GPT_OSS_120B, quant_method="mxfp4") / 2**30 == pytest.approx(60.8, abs=0.05)


def test_fp8_is_a_byte_each_and_a_scale_a_block():
    outside = 2 * (8_030_261_248 - LINEAR)
    assert total(LLAMA_8B, quant_method="fp8") == outside + LINEAR + 4 * LINEAR // 128**2
    kept = total(LLAMA_8B, quant_method="fp8", modules_to_not_convert=["mlp", "lm_head"])
    mlp = 3 * 32 * 4096 * 14336
    assert kept == outside + 2 * mlp + (LINEAR - mlp) + 4 * (LINEAR - mlp) // 128**2


@pytest.mark.parametrize(
    "options, gigabytes",
    [
        ({"load_in_8bit": True}, 9.087),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 6.028),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, 5.702),
    ],
)
def test_bitsandbytes_is_what_quantizing_gives(options, gigabytes):
    assert total(LLAMA_8B, quant_method="bitsandbytes", **options) / 1e9 == pytest.approx(gigabytes, abs=6e-4)


@pytest.mark.parametrize(
    "quantization, names",
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized by gptq"),
        ({"bits": 4}, "quantized by None"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size"),
        ({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type"),
    ],
)
def test_what_the_config_does_not_tell_is_refused(quantization, names):
    with pytest.raises(UsageError, match=names):
        total(LLAMA_8B, **quantization)
