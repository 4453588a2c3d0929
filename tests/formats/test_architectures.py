"""What is written loads in transformers with bitsandbytes, module for module, and computes what their own quantization does."""

import bitsandbytes as bnb
import pytest
import torch
import transformers

import qcli
from tests.models import ARCHITECTURES, example_inputs, make_model

KINDS = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt}


def bnb_config(bits: int):
    """bitsandbytes' own quantization of the same model, computed in float32."""
    return transformers.BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_reloads_in_transformers_and_bitsandbytes(name, tmp_path):
    model_class, _, linears = ARCHITECTURES[name]
    original = make_model(name, tmp_path / "model")
    inputs = example_inputs(original)
    for bits, kind in KINDS.items():
        out = tmp_path / f"out{bits}"
        report = qcli.quantize(str(tmp_path / "model"), out, bits=bits)
        assert report.quantized_modules == linears
        loaded, info = model_class.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert sum(isinstance(m, kind) for m in loaded.modules()) == linears
        ours, _ = qcli.load(str(out), device="cpu")
        with torch.no_grad():
            a, c = loaded.eval()(**inputs).logits.float(), ours(**inputs).logits.float()
            full = original(**inputs).logits.float()
        scale = full.abs().max()
        # Our modules against bitsandbytes': bfloat16 sums in another order, and float16 activations there.
        assert (c - a).abs().max() <= 0.04 * scale
        assert (a - full).abs().max() <= (0.5 if bits == 4 else 0.05) * scale

        # In float32 no rounding of bfloat16 stands between equal weights: what is left is double quantization's neighbouring code
        # here and there.
        exact = tmp_path / f"exact{bits}"
        settings = {"compute_dtype": "float32"} if bits == 4 else {}
        qcli.quantize(str(tmp_path / "model"), exact, bits=bits, dtype="float32", settings=settings)
        loaded = model_class.from_pretrained(exact).eval()
        theirs = model_class.from_pretrained(tmp_path / "model", quantization_config=bnb_config(bits), dtype=torch.float32).eval()
        with torch.no_grad():
            a, b = loaded(**inputs).logits, theirs(**inputs).logits
        assert a.dtype == b.dtype == torch.float32
        assert (a - b).abs().max() <= 0.002 * scale


def test_an_architecture_of_other_linears_is_refused(tmp_path, quick_cli):
    torch.manual_seed(0)
    config = transformers.FalconConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    transformers.FalconForCausalLM(config).save_pretrained(tmp_path / "falcon")
    done = quick_cli("quantize", "falcon")
    assert done.returncode == 1
    assert "transformers converts no Linear of FalconForCausalLM" in done.stderr and "FalconLinear" in done.stderr
    assert "modules=rules" in done.stderr
    by_rules = quick_cli("quantize", "falcon", "--set", "modules=rules", "--dry-run")
    assert by_rules.returncode == 0 and "rules by name and shape" in by_rules.stdout and "nf4" in by_rules.stdout


def test_an_architecture_transformers_does_not_know_goes_by_rules(tmp_path, quick_cli):
    import json

    make_model("llama", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config |= {"model_type": "newest", "architectures": ["NewestForCausalLM"]}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    done = quick_cli("quantize", "model", "--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert "does not know the architecture NewestForCausalLM" in plan["modules_decided_by"]
    quantized = {t["name"] for t in plan["tensors"] if t["to"] == "nf4"}
    assert len(quantized) == 14 and not any("embed" in n or "lm_head" in n or "norm" in n for n in quantized)
    assert "lm_head" in plan["skip_modules"]


def test_fused_experts_stay_16_bit_and_the_plan_says_so(tmp_path, quick_cli):
    make_model("mixtral", tmp_path / "model")
    done = quick_cli("quantize", "model", "--dry-run")
    experts = 2 * 4 * 3 * 64 * 128
    assert f"fused experts stay bfloat16: {experts:,} parameters, {2 * experts / 1000:.0f} kB" in done.stdout


def test_float16_keeps_float32_where_transformers_does(tmp_path):
    from safetensors import safe_open

    make_model("t5", tmp_path / "model", torch.float32)
    for dtype, expected in (("float16", torch.float32), ("bfloat16", torch.bfloat16)):
        out = tmp_path / dtype
        qcli.quantize(str(tmp_path / "model"), out, dtype=dtype)
        with safe_open(out / "model.safetensors", "pt") as file:
            assert file.get_tensor("decoder.block.0.layer.2.DenseReluDense.wo.weight").dtype == expected
            assert file.get_tensor("shared.weight").dtype == getattr(torch, dtype)
        loaded = transformers.T5ForConditionalGeneration.from_pretrained(out)
        assert loaded.decoder.block[0].layer[2].DenseReluDense.wo.weight.dtype == expected
