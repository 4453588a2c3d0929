"""Stored fields that change what the bytes of a bitsandbytes checkpoint mean: each is read, and obeyed or refused."""

import json
import shutil

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

import qcli
from qcli.errors import CheckpointError
from tests.models import add_tokenizer, example_inputs, make_model

NAME = "model.layers.0.mlp.up_proj.weight"
SCB, FORMAT = NAME.replace("weight", "SCB"), NAME.replace("weight", "weight_format")
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    make_model("llama", folder / "model")
    add_tokenizer(folder / "model")
    qcli.quantize(str(folder / "model"), folder / "nf4", bits=4)
    qcli.quantize(str(folder / "model"), folder / "plain", bits=4, double_quant=False)
    qcli.quantize(str(folder / "model"), folder / "int8", bits=8)
    return folder


@pytest.fixture
def folder(templates, tmp_path):
    def copy(name):
        return shutil.copytree(templates / name, tmp_path / name)

    return copy


def change(folder, tensors):
    """Rewrites the weights with what `tensors` makes of them."""
    path = folder / "model.safetensors"
    state = load_file(path)
    tensors(state)
    save_file(state, path, {"format": "pt"})


def with_state(**fields):
    def edit(state):
        value = json.loads(bytes(state[STATE].tolist())) | fields
        value = {key: field for key, field in value.items() if field != "absent"}
        state[STATE] = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)

    return edit


def replaced(name, make):
    def edit(state):
        state[name] = make(state[name]).contiguous()

    return edit


def without(name):
    return lambda state: state.pop(name)


FAULTS = {
    "quant_type of another": ("nf4", with_state(quant_type="fp4"), "says quant_type fp4"),
    "unknown quant_type": ("nf4", with_state(quant_type="nf5"), 'quant_type is "nf5" (a string), expected nf4 or fp4'),
    "no quant_type": ("nf4", with_state(quant_type="absent"), "has no quant_type"),
    "another block size": ("nf4", with_state(blocksize=128), f"{NAME}.absmax is U8 of shape [128], expected U8 of [64]"),
    "block size of text": ("nf4", with_state(blocksize="64"), 'blocksize is "64"'),
    "block size zero": ("nf4", with_state(blocksize=0), "blocksize is 0"),
    "transposed": ("nf4", with_state(shape=[64, 128]), "says shape [64, 128], the model expects [128, 64]"),
    "shape of one": ("nf4", with_state(shape=[8192]), "shape is [8192] (a list), expected a list of 2 items"),
    "nested block size": ("nf4", with_state(nested_blocksize=128), "nested_blocksize is 128 (a number), expected 256"),
    "nested dtype": ("nf4", with_state(nested_dtype="float16"), 'nested_dtype is "float16" (a string), expected float32'),
    "no nested offset": ("nf4", with_state(nested_offset="absent"), "has no nested_offset"),
    "offset of text": ("nf4", with_state(nested_offset="0.1"), "nested_offset is"),
    "offset not finite": ("nf4", with_state(nested_offset=float("nan")), "nested_offset is NaN"),
    "another dtype": ("nf4", with_state(dtype="int8"), "dtype is"),
    "state is a list": ("nf4", replaced(STATE, lambda x: torch.frombuffer(bytearray(b"[]"), dtype=torch.uint8)), "expected a JSON"),
    "state is no text": ("nf4", replaced(STATE, lambda x: x + 128), "is not valid JSON"),
    "another codebook": ("nf4", replaced(f"{NAME}.quant_map", lambda x: -x), "is not the table of nf4"),
    "another nested codebook": ("nf4", replaced(f"{NAME}.nested_quant_map", lambda x: x / 2), "table of double quantization"),
    "absmax as float": ("nf4", replaced(f"{NAME}.absmax", lambda x: x.float()), "is F32 of shape [128], expected U8"),
    "absmax as codes": ("plain", replaced(f"{NAME}.absmax", lambda x: x.to(torch.uint8)), "is U8 of shape [128], expected F32"),
    "absmax too short": ("plain", replaced(f"{NAME}.absmax", lambda x: x[:-1]), "of shape [127], expected F32 of [128]"),
    "nested absmax too long": ("nf4", replaced(f"{NAME}.nested_absmax", lambda x: x.repeat(2)), "[2], expected F32 of [1]"),
    "too few codes": ("nf4", replaced(NAME, lambda x: x[:-1]), "holds 4,095 bytes of U8, expected 4,096"),
    "no absmax": ("nf4", without(f"{NAME}.absmax"), f"{NAME} lacks {NAME}.absmax"),
    "no state": ("nf4", without(STATE), f"1 stored as U8 without what would decode them: {NAME}"),
    "weight_format of columns": ("int8", replaced(FORMAT, lambda x: x + 1), "and only 0, plain rows, is read"),
    "SCB too short": ("int8", replaced(SCB, lambda x: x[:-1]), "SCB is F32 of shape [127], expected F32 of [128]"),
    "SCB in 16 bits": ("int8", replaced(SCB, lambda x: x.half()), "SCB is F16 of shape [128], expected F32"),
    "no SCB": ("int8", without(SCB), f"1 stored as I8 without what would decode them: {NAME}"),
    "int8 transposed": ("int8", replaced(NAME, lambda x: x.t()), "is I8 of shape [64, 128], expected I8 of [128, 64]"),
    "weights not int8": ("int8", replaced(NAME, lambda x: x.half()), "is F16 of shape [128, 64], expected I8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_decoded_is_refused(fault, folder):
    name, edit, words = FAULTS[fault]
    model = folder(name)
    change(model, edit)
    with pytest.raises(CheckpointError) as refused:
        qcli.load(str(model), device="cpu")
    assert words in refused.value.message
    assert refused.value.hint == "Quantize the model again."
    (model / "qcli.json").unlink()  # now it is somebody else's
    with pytest.raises(CheckpointError) as refused:
        qcli.load(str(model), device="cpu")
    assert "Quantize" not in refused.value.hint


CONFIG = {
    "llm_int8_threshold": ("6", -1, float("nan"), [6.0]),
    "bnb_4bit_compute_dtype": ("int8", "float64", 4, ["bfloat16"]),
    "bnb_4bit_quant_type": ("nf5", 4),
    "llm_int8_skip_modules": ("lm_head", [1], {}),
    "load_in_4bit": ("yes", 4),
    "quant_method": (3, ["bitsandbytes"]),
}


@pytest.mark.parametrize("field", CONFIG)
def test_fields_of_the_config_are_checked(field, folder):
    model = folder("nf4")
    config = json.loads((model / "config.json").read_text())
    for value in CONFIG[field]:
        config["quantization_config"][field] = value
        (model / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=f"quantization_config: {field} is .*, expected"):
            qcli.load(str(model), device="cpu")


def test_quantized_tensors_that_are_no_linear(tmp_path):
    """LLM.int8() of a mixture as transformers 4 wrote it: its experts are fused in transformers 5, which would read codes."""
    make_model("mixtral", tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    state = load_file(path)
    name = next(n for n in state if "experts.0.w1" in n or "experts.0.gate_proj" in n or n.endswith("gate.weight"))
    state |= {name: state[name].to(torch.int8), name.replace("weight", "SCB"): torch.ones(len(state[name]))}
    save_file(state, path, {"format": "pt"})
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="1 quantized, which are no linear modules in this transformers"):
        qcli.load(str(tmp_path / "model"), device="cpu")


def test_a_threshold_of_zero_is_kept(folder):
    model = folder("int8")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"]["llm_int8_threshold"] = 0
    (model / "config.json").write_text(json.dumps(config))
    loaded, _ = qcli.load(str(model), device="cpu")
    assert loaded.model.layers[0].mlp.up_proj.threshold == 0


@pytest.mark.parametrize("storage", ["bfloat16", "float32", "uint8"])
def test_codes_stored_under_another_dtype(storage, templates, tmp_path):
    """bnb_4bit_quant_storage, as FSDP wants it: transformers' own checkpoint gives transformers' own weights."""
    bits = t.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=storage)
    theirs = t.LlamaForCausalLM.from_pretrained(templates / "model", quantization_config=bits)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = qcli.load(str(tmp_path / "theirs"), device="cpu")
    expected = {n: m for n, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"}
    assert len(expected) == 14
    from bitsandbytes.functional import dequantize_4bit

    for name, module in expected.items():
        weight = dequantize_4bit(module.weight.data.view(torch.uint8), module.weight.quant_state)
        assert torch.equal(ours.get_submodule(name).dequantize(weight.dtype), weight), name
    with torch.no_grad():
        assert ours(**example_inputs(ours)).logits.isfinite().all()


def test_a_skip_list_in_older_names(templates, tmp_path):
    """The headers say which modules are 16-bit, whatever names the list has."""
    model = tmp_path / "part"
    qcli.quantize(str(templates / "model"), model, bits=4, skip=["model.layers.1.mlp"])
    expected, _ = qcli.load(str(model), device="cpu")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", "language_model.model.layers.1.mlp"]
    (model / "config.json").write_text(json.dumps(config))
    loaded, _ = qcli.load(str(model), device="cpu")
    kinds = {n: type(m) for n, m in loaded.named_modules()}
    assert kinds == {n: type(m) for n, m in expected.named_modules()}
    assert kinds["model.layers.1.mlp.up_proj"] is torch.nn.Linear
    inputs = example_inputs(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, expected(**inputs).logits)
