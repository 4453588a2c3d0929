"""`qcli dequantize`, and `quantize` of what was published in FP8."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import qcli
from qcli.errors import CheckpointError, PlanError
from qcli.nn.quantized_embedding import QuantizedEmbedding
from qcli.nn.quantized_linear import QuantizedLinear
from qcli.quantization import dequantize as verb
from tests.models import add_tokenizer, make_model, make_tied


def weights_of(model):
    """The weight of each quantized module in bfloat16, by its name."""
    found = {}
    for name, module in model.named_modules():
        linear = module.linear if isinstance(module, QuantizedEmbedding) else module
        if isinstance(linear, QuantizedLinear):
            found[f"{name}.weight"] = linear.dequantize(torch.bfloat16)
    return found


@pytest.mark.parametrize(
    "name, options",
    [
        ("llama", {"bits": 4}),
        ("llama", {"bits": 8}),
        ("gpt2", {"bits": 4}),
        ("qwen2", {"method": "rtn", "group_size": 32, "format": "gptq"}),
        ("qwen2", {"method": "hqq", "format": "awq"}),
        ("qwen2", {"method": "nvfp4"}),
        ("llama", {"bits": 4, "head": 8}),
    ],
    ids=str,
)
def test_a_plain_model_of_the_same_weights(name, options, tmp_path):
    (make_tied if "head" in options else make_model)(name, tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    qcli.quantize(str(tmp_path / "model"), tmp_path / "quantized", device="cpu", **options)
    made = qcli.dequantize(str(tmp_path / "quantized"), tmp_path / "plain")
    expected = weights_of(qcli.load(str(tmp_path / "quantized"), device="cpu")[0])
    assert made.modules == len({id(w.untyped_storage()) for w in expected.values()}) or "head" in options
    plain, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", output_loading_info=True, dtype=torch.bfloat16
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = plain.state_dict()
    original = load_file(tmp_path / "model" / "model.safetensors")
    for key, tensor in state.items():
        weight = expected.get(key, original.get(key))
        weight = weight.t() if weight is not None and key in expected and name == "gpt2" else weight
        assert weight is None or torch.equal(tensor, weight.to(tensor.dtype)), key
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert {"config.json", "model.safetensors", "qcli.json", "tokenizer.json"} <= names
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    make_model("llama", tmp_path / "model")
    qcli.quantize(str(tmp_path / "model"), tmp_path / "quantized", method="rtn", group_size=32)
    qcli.dequantize(str(tmp_path / "quantized"), tmp_path / "whole")
    decode, count = verb.decode, 0

    def stops(*arguments):
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        return decode(*arguments)

    monkeypatch.setattr(verb, "decode", stops)
    with pytest.raises(KeyboardInterrupt):
        qcli.dequantize(str(tmp_path / "quantized"), tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    qcli.dequantize(str(tmp_path / "quantized"), tmp_path / "out")
    assert count < 6 + 14  # what was finished was not decoded again
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_what_is_refused(tmp_path, quick_cli):
    make_model("llama", tmp_path / "model")
    with pytest.raises(CheckpointError, match="is not quantized"):
        qcli.dequantize(str(tmp_path / "model"))
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "quip"}}))
    done = quick_cli("dequantize", tmp_path / "model")
    assert done.returncode == 1 and "quantized by quip, which qcli does not read" in done.stderr
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    qcli.quantize(str(tmp_path / "model"), tmp_path / "quantized", bits=4)
    with pytest.raises(PlanError, match="exists already"):
        qcli.dequantize(str(tmp_path / "quantized"), tmp_path / "model")
    done = quick_cli("dequantize", tmp_path / "quantized", "--output", tmp_path / "out", "--dtype", "float32", "--json")
    assert json.loads(done.stdout)["dtype"] == "float32" and json.loads(done.stdout)["modules"] == 14


@pytest.fixture
def in_fp8(tmp_path):
    """A model as DeepSeek publishes: E4M3 with a float32 scale for each block, here of 32 x 32, which divide few weights; and its
    weights in float32."""
    make_model("qwen2", tmp_path / "fp8")
    state, values = load_file(tmp_path / "fp8/model.safetensors"), {}
    for name in [n for n in state if "_proj.weight" in n]:
        weight = state[name].float()
        rows, columns = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -columns % 48, 0, -rows % 48))
        scale = padded.unflatten(0, (-1, 48)).unflatten(-1, (-1, 48)).abs().amax((1, 3)) / 448
        wide = scale.repeat_interleave(48, 0)[:rows].repeat_interleave(48, 1)[:, :columns]
        state[name] = (weight / wide).to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = scale
        values[name] = state[name].float() * wide
    save_file(state, tmp_path / "fp8/model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "fp8/config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [48, 48]}
    (tmp_path / "fp8/config.json").write_text(json.dumps(config))
    return tmp_path / "fp8", values


@pytest.mark.parametrize("method", ["nf4", "rtn", "nvfp4"])
def test_models_in_fp8_are_quantized_from_their_values(method, in_fp8, tmp_path):
    folder, values = in_fp8
    plain = tmp_path / "plain"
    qcli.dequantize(str(folder), plain)
    state = load_file(plain / "model.safetensors")
    for name, weight in values.items():
        assert torch.equal(state[name], weight.bfloat16()), name
    options = {"method": method, "skip": ["*.o_proj"], "device": "cpu"} | ({"group_size": 32} if method == "rtn" else {})
    report = qcli.quantize(str(folder), tmp_path / "a", **options)
    qcli.quantize(str(plain), tmp_path / "b", **options)
    assert report.quantized_modules == 12
    ours, theirs = (load_file(tmp_path / each / "model.safetensors") for each in "ab")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)), name


def test_scales_that_do_not_fit_are_found_before_the_start(in_fp8, tmp_path):
    folder, _ = in_fp8
    state = load_file(folder / "model.safetensors")
    first = "model.layers.0.mlp.up_proj.weight_scale_inv"
    save_file(state | {first: torch.ones(7, 7)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="up_proj.weight_scale_inv is F32 of shape \\[7, 7\\]"):
        qcli.quantize(str(folder), tmp_path / "out")


def test_square_weights_of_gpt2_stay_in_by_out(tmp_path):
    """Their shape does not show that a module holds them transposed."""
    original = make_model("gpt2", tmp_path / "model", torch.float16)
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out", bits=8)
    qcli.dequantize(str(tmp_path / "out"), tmp_path / "plain")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    weight, decoded = (m.transformer.h[0].attn.c_proj.weight.float() for m in (original, again))
    assert weight.shape[0] == weight.shape[1]
    assert (decoded - weight).norm() < 0.05 * weight.norm()
