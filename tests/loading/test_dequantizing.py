"""transformers' own `model.dequantize()` on what `qcli.load` gives: the plain model of the same weights."""

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

import qcli
from qcli.errors import UsageError
from qcli.nn.quantized_embedding import QuantizedEmbedding
from qcli.nn.quantized_linear import QuantizedLinear
from tests.adapters import make_adapter
from tests.models import example_inputs, make_model, make_tied


@pytest.mark.parametrize(
    "name, options",
    [
        ("llama", {"bits": 4}),
        ("qwen2", {"bits": 8}),  # with biases
        ("gpt2", {"bits": 4}),
        ("llama", {"method": "rtn", "group_size": 32, "format": "gptq"}),
        ("llama", {"method": "nf3", "head": 8}),
        ("gemma3_text", {"bits": 4, "head": 4}),  # an embedding with a scale, tied
        ("mixtral", {"bits": 4}),
    ],
    ids=str,
)
def test_it_is_the_plain_model_of_the_same_weights(name, options, tmp_path):
    (make_tied if "head" in options else make_model)(name, tmp_path / "model")
    qcli.quantize(str(tmp_path / "model"), tmp_path / "quantized", **options)
    qcli.dequantize(str(tmp_path / "quantized"), tmp_path / "plain")
    loaded, _ = qcli.load(str(tmp_path / "quantized"), device="cpu")
    found, expected = loaded.dequantize(), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert found is loaded and not found.is_quantized and not hasattr(found.config, "quantization_config")
    assert not any(isinstance(module, (QuantizedLinear, QuantizedEmbedding)) for module in found.modules())
    assert [type(module) for module in found.modules()] == [type(module) for module in expected.modules()]
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    inputs = example_inputs(found)
    with torch.no_grad():
        assert torch.equal(found(**inputs).logits, expected(**inputs).logits)
    assert found.all_tied_weights_keys == expected.all_tied_weights_keys
    if expected.config.tie_word_embeddings:
        assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
    found.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in again.state_dict().items())


def test_in_another_dtype_and_from_what_was_quantized_while_it_was_read(tmp_path):
    make_model("llama", tmp_path / "model")
    loaded, _ = qcli.load(str(tmp_path / "model"), bits=4, device="cpu")
    weight = loaded.model.layers[0].mlp.up_proj.dequantize(torch.float32)
    found = loaded.dequantize(torch.float32)
    assert torch.equal(found.model.layers[0].mlp.up_proj.weight, weight)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32} == {found.config.dtype}
    assert found(**example_inputs(found)).logits.dtype == torch.float32


def test_an_adapter_stays(tmp_path):
    make_adapter(make_model("llama", tmp_path / "model", torch.float32), tmp_path / "adapter")
    options = {"bits": 8, "device": "cpu", "int8_activations": False}
    loaded, _ = qcli.load(str(tmp_path / "model"), adapter=str(tmp_path / "adapter"), **options)
    inputs = example_inputs(loaded)
    with torch.no_grad():
        before = loaded(**inputs).logits
        torch.testing.assert_close(loaded.dequantize()(**inputs).logits, before, rtol=1e-4, atol=1e-4)


def test_hooks_of_a_split_model_stay(tmp_path):
    make_model("llama", tmp_path / "model")
    loaded, _ = qcli.load(str(tmp_path / "model"), bits=4, device="cpu")
    hook = AlignDevicesHook(execution_device="cpu", io_same_device=True)
    add_hook_to_module(loaded.model.layers[1].mlp.up_proj, hook)
    found = loaded.dequantize()
    assert found.model.layers[1].mlp.up_proj._hf_hook is hook
    assert found(**example_inputs(found)).logits.isfinite().all()


def test_weights_that_are_kept_elsewhere_are_refused(tmp_path):
    make_model("llama", tmp_path / "model")
    loaded, _ = qcli.load(str(tmp_path / "model"), bits=4, device="cpu")
    loaded.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(UsageError, match="up_proj is kept elsewhere until it is called"):
        loaded.dequantize()


def test_adapters_may_be_trained_on_it(tmp_path):
    make_model("llama", tmp_path / "model")
    assert qcli.load(str(tmp_path / "model"), bits=4, device="cpu")[0].hf_quantizer.is_trainable
