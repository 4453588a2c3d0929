"""The format `qcli` through transformers' own from_pretrained, where qcli is imported: in which order, of what, and its errors."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import qcli
from qcli.errors import CheckpointError, UsageError
from qcli.nn.quantized_linear import QuantizedLinear
from tests.conftest import ROOT
from tests.models import add_tokenizer, example_inputs, make_model, make_tied

DEMO = str(ROOT / "examples" / "demo-model")
UP = "model.layers.0.mlp.up_proj"
FORMS = {
    "nf3": {"method": "nf3"},
    "4 bits, a tied head of 8": {"bits": 4, "head": 8},
    "8 bits": {"bits": 8},
    "kmeans, sparse": {"method": "kmeans", "settings": {"bits": 3, "sparse": 0.05}},
    "rtn, zero points": {"method": "rtn", "settings": {"bits": 4, "group_size": 32, "zero_point": True}},
    "nvfp4": {"method": "nvfp4"},
}
IN_ORDER = {
    "qcli, transformers": "import qcli\nassert not {'torch', 'transformers'} & sys.modules.keys()\nimport transformers",
    "transformers, qcli": "import transformers\nimport qcli",
    "transformers' models, qcli": "import transformers\ntransformers.PreTrainedModel\nimport qcli",
    "a verb, transformers": "import qcli\nqcli.load(sys.argv[1])\nimport transformers",
}
LOADS = """
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.get_submodule(sys.argv[2])).__module__, [type(f).__name__ for f in sys.meta_path if "qcli." in type(f).__module__])
"""


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    make_tied("llama", folder, torch.bfloat16)
    add_tokenizer(folder)
    return folder


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(**example_inputs(model)).logits


def from_pretrained(folder, **options):
    """The model, after nothing was found missing or too much."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("order", IN_ORDER)
def test_in_any_order_of_imports(order, tmp_path):
    qcli.quantize(DEMO, tmp_path / "out", method="nf3")
    code = f"import sys\n{IN_ORDER[order]}{LOADS}"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out", UP], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["qcli.nn.linear_table", "[]"]


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_model_that_load_gives(form, tied, tmp_path):
    qcli.quantize(str(tied), tmp_path / "out", format="qcli", **FORMS[form])
    theirs, (ours, _) = from_pretrained(tmp_path / "out"), qcli.load(str(tmp_path / "out"), device="cpu")
    modules = [{n: type(m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)} for model in (theirs, ours)]
    assert modules[0] == modules[1] and len(modules[0]) == 14 + ("head" in FORMS[form])
    assert torch.equal(logits(theirs), logits(ours)) and torch.isfinite(logits(ours)).all()
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert theirs.config.to_dict()["quantization_config"] == stated


def test_columns_that_lie_in_a_file_apart(tied, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "examples" / "stories.jsonl").read_text()[:20_000])
    made = {"bits": 8, "calibrate": True, "text": str(text), "tokens": 500, "check": False, "format": "qcli"}
    qcli.quantize(str(tied), tmp_path / "out", settings={"outlier_share": 0.25}, **made)
    theirs, (ours, _) = from_pretrained(tmp_path / "out"), qcli.load(str(tmp_path / "out"), device="cpu")
    columns = theirs.get_submodule(UP).outlier_columns
    assert columns.numel() == 16 and torch.equal(columns, ours.get_submodule(UP).outlier_columns)
    assert torch.equal(logits(theirs), logits(ours))


def test_a_device_map(tied, tmp_path):
    qcli.quantize(str(tied), tmp_path / "out", bits=4, head=8)
    split = from_pretrained(tmp_path / "out", device_map={"": "cpu"})
    assert torch.equal(logits(split), logits(from_pretrained(tmp_path / "out")))
    with pytest.raises(UsageError, match="leaves modules to the disk"):
        from_pretrained(tmp_path / "out", device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=tmp_path / "disk")


def test_a_damaged_checkpoint_is_an_error_and_not_a_random_weight(tmp_path):
    make_model("llama", tmp_path / "model", torch.bfloat16)
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out", method="nf3")
    path = tmp_path / "out" / "model.safetensors"
    whole = load_file(path)
    save_file({name: tensor for name, tensor in whole.items() if name != f"{UP}.weight.scale"}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"does not fit its model: 1 misshaped: {UP}.weight"):
        from_pretrained(tmp_path / "out")
    save_file({name: tensor for name, tensor in whole.items() if name != "model.norm.weight"}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="missing: model.norm.weight"):
        from_pretrained(tmp_path / "out")


def test_a_subfolder(tied, tmp_path):
    qcli.quantize(str(tied), tmp_path / "out", method="nf3")
    (tmp_path / "above").mkdir()
    shutil.copytree(tmp_path / "out", tmp_path / "above" / "inner")
    found = from_pretrained(tmp_path / "above", subfolder="inner")
    assert torch.equal(logits(found), logits(from_pretrained(tmp_path / "out")))


def test_without_files_there_is_nothing_to_read():
    config = transformers.LlamaConfig(quantization_config={"quant_method": "qcli"})
    with pytest.raises(UsageError, match="read from files"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict={})
