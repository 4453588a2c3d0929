"""LLM.int8() with columns that texts choose, stored in 16 bits: what it gains, what others read, and what hostile files do."""

import json
import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qcli
from qcli.errors import CheckpointError, UsageError
from qcli.methods.simulate import with_fixed_columns
from qcli.nn.linear_8bit import Linear8bit
from qcli.quantization import shard_files, staging
from qcli.quantization.quantize import make_plan
from tests.conftest import run_cli
from tests.models import add_tokenizer, make_model
from tests.quantization.test_calibrated import DEMO, digest, text  # noqa: F401

MODULE = "model.layers.0.mlp.down_proj"
MADE = {"bits": 8, "calibrate": True, "tokens": 2000, "settings": {"outlier_share": "0.25"}}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model whose norms make three outliers in every token."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    model = make_model("llama", folder)
    add_tokenizer(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[[2, 17, 40]] = 30
            layer.post_attention_layernorm.weight[[2, 17, 40]] = 30
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(llama, text, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("made")
    report = qcli.quantize(str(llama), folder / "out", text=text, **MADE)
    qcli.quantize(str(llama), folder / "plain", bits=8)
    return folder, report


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made[0] / "out", tmp_path / "copy")


def test_what_it_gains(made):
    found = made[1].calibration
    assert found.checked.kl < 0.5 * found.checked.plain_kl and found.modules == 14
    assert sum(kind.modules for kind in found.kinds) == 14
    assert all(kind.relative_error < kind.plain_relative_error < 0.2 for kind in found.kinds)
    assert found.seconds["statistics"] > 0 and found.seconds["check"] > 0
    tensors = load_file(made[0] / "out" / "outliers.safetensors")
    for name, columns in tensors.items():
        if name.endswith("outlier_columns") and ("self_attn.q" in name or "gate" in name):
            assert {2, 17, 40} <= set(columns.tolist())
    shared = [tensors[f"model.layers.0.self_attn.{each}_proj.outlier_columns"] for each in "qkv"]
    assert torch.equal(shared[0], shared[1]) and torch.equal(shared[0], shared[2])


def test_what_is_stored(made, llama):
    out, plain = made[0] / "out", load_file(made[0] / "plain" / "model.safetensors")
    source = load_file(llama / "model.safetensors")
    assert sorted(p.name for p in out.glob("*.safetensors*")) == [
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "outliers.safetensors",
    ]
    stored = load_file(out / "model-00001-of-00001.safetensors")
    assert stored.keys() == plain.keys() and all(torch.equal(stored[name], plain[name]) for name in plain)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stored.keys() and index["metadata"]["outlier_columns"] == "outliers.safetensors"
    with safe_open(out / "outliers.safetensors", "pt") as beside:
        names = list(beside.keys())
        assert len(names) == 2 * 14
        columns, kept = (beside.get_tensor(f"{MODULE}.{role}") for role in ("outlier_columns", "outlier_weight"))
    assert columns.dtype == torch.int32 and len(columns) == 128 // 4 and (columns[1:] > columns[:-1]).all()
    assert torch.equal(kept, source[f"{MODULE}.weight"][:, columns.long()].to(kept.dtype))


def test_transformers_and_bitsandbytes_load_it_as_llm_int8(made):
    models = [AutoModelForCausalLM.from_pretrained(made[0] / name) for name in ("out", "plain")]
    ours, theirs = (model.state_dict() for model in models)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(models[0](ids).logits, models[1](ids).logits)


def definition(module: Linear8bit, x: torch.Tensor) -> np.ndarray:
    """The docstring of the op, in integers and float64."""
    rows, columns = x.double().numpy(), module.outlier_columns.long().numpy()
    rest = rows.copy()
    rest[:, columns] = 0
    outlier = np.abs(rest) >= (module.threshold or np.inf)
    detected = outlier.any(0)
    absmax = np.where(outlier, 0, np.abs(rest)).max(1, keepdims=True)
    q = np.rint(np.where(detected, 0, rest) * (127 / absmax))
    codes, scale = module.weight.double().numpy(), module.SCB.double().numpy()
    y = (q @ codes.T) * absmax * scale / 127**2
    y += rest[:, detected] @ (codes[:, detected] * scale[:, None] / 127).T
    return y + rows[:, columns] @ module.outlier_weight.double().numpy().T


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_the_module_is_its_definition(tokens, made):
    model, _ = qcli.load(str(made[0] / "out"), dtype="float32", device="cpu")
    x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 20
    for threshold in (0.0, 6.0):
        module = model.get_submodule(MODULE)
        module.threshold = threshold
        expected = definition(module, x)
        y = module(x).double().numpy()
        assert np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()
        simulated = with_fixed_columns(module.dequantize(torch.float32), module.outlier_columns, threshold).linear(x)
        assert np.abs(simulated.double().numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_check_is_what_evaluate_measures(made, llama, text):  # noqa: F811
    ours, plain = (
        qcli.evaluate(str(made[0] / name), against=str(llama), text=text, tokens=2000, dtype="float32", device="cpu")
        .rows[1]
        .against
        for name in ("out", "plain")
    )
    assert ours.divergence.mean.value < 0.5 * plain.divergence.mean.value


def test_dequantize_takes_the_columns_as_they_are(made, llama, tmp_path):
    qcli.dequantize(str(made[0] / "out"), tmp_path / "whole")
    qcli.dequantize(str(made[0] / "plain"), tmp_path / "plain")
    ours, plain, source = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", tmp_path / "plain", llama))
    columns = load_file(made[0] / "out" / "outliers.safetensors")[f"{MODULE}.outlier_columns"].long()
    expected = plain[f"{MODULE}.weight"].index_copy(
        1, columns, source[f"{MODULE}.weight"][:, columns].to(plain[f"{MODULE}.weight"])
    )
    assert ours.keys() == plain.keys() and torch.equal(ours[f"{MODULE}.weight"], expected)


def test_threads_do_not_matter(made, llama, text, tmp_path):  # noqa: F811
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        qcli.quantize(str(llama), tmp_path / "out", text=text, **MADE)
    finally:
        torch.set_num_threads(before)
    assert digest(tmp_path / "out") == digest(made[0] / "out")


def killed(folder, text, after):  # noqa: F811
    """In a process of its own: calibrates, and kills itself once so many units are journalled."""
    os.chdir(folder)
    shard_files.SYNC_SECONDS = 0
    finish = staging.Staging.finish_work

    def finish_work(self, index, errors):
        finish(self, index, errors)
        if len(self.done) >= after:
            os.kill(os.getpid(), signal.SIGKILL)

    staging.Staging.finish_work = finish_work
    qcli.quantize("model", "out", text=text, **MADE)


@pytest.mark.parametrize("after", [3, 9])
def test_kill_and_rerun(after, made, llama, text, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "model").symlink_to(llama)
    process = multiprocessing.get_context("spawn").Process(target=killed, args=(tmp_path, text, after))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "out").exists()
    monkeypatch.chdir(tmp_path)
    qcli.quantize("model", "out", text=text, **MADE)
    assert digest(tmp_path / "out") == digest(made[0] / "out")


def changed(folder, **tensors):
    path = folder / "outliers.safetensors"
    save_file({name: value for name, value in (load_file(path) | tensors).items() if value is not None}, path, {"format": "pt"})


def put(place, column):
    return lambda x: x.clone().index_fill_(0, torch.tensor(place), column)


COLUMNS, KEPT = f"{MODULE}.outlier_columns", f"{MODULE}.outlier_weight"
HOSTILE = {
    "too large a column": ({COLUMNS: put(31, 128)}, "names column 128, expected 0 to 127"),
    "a negative column": ({COLUMNS: put(0, -1)}, "names column -1, expected 0 to 127"),
    "a column twice": ({COLUMNS: lambda x: x.clone().index_copy_(0, torch.tensor(1), x[:1])}, "is not ascending"),
    "too few rows": ({KEPT: lambda x: x[:-1].clone()}, r"is BF16 of shape \[63, 32\], expected BF16 or F16 of \[64, 32\]"),
    "too few columns": ({COLUMNS: lambda x: x[:8].clone()}, r"outlier_weight is BF16 of shape \[64, 32\], expected"),
    "other dtypes": ({COLUMNS: lambda x: x.long()}, "outlier_columns is I64"),
    "float32": ({KEPT: lambda x: x.float()}, "outlier_weight is F32"),
    "no columns": ({COLUMNS: lambda x: None}, f"{MODULE} lacks {COLUMNS}"),
    "no weight": ({KEPT: lambda x: None}, f"{MODULE} lacks {KEPT}"),
    "none at all": ({COLUMNS: lambda x: x[:0].clone(), KEPT: lambda x: x[:, :0].clone()}, "names 0 columns, expected 1 to 128"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name, copy):
    edits, message = HOSTILE[name]
    tensors = load_file(copy / "outliers.safetensors")
    changed(copy, **{each: edit(tensors[each]) for each, edit in edits.items()})
    with pytest.raises(CheckpointError, match=message):
        qcli.load(str(copy), device="cpu")


def test_a_file_that_is_gone_is_missed(copy):
    (copy / "outliers.safetensors").unlink()
    with pytest.raises(CheckpointError, match="names outliers.safetensors for columns in 16 bits, and it is not there"):
        qcli.load(str(copy), device="cpu")


def test_a_file_that_no_index_names_is_passed_over(copy):
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["metadata"]["outlier_columns"]
    path.write_text(json.dumps(index))
    model, _ = qcli.load(str(copy), device="cpu")
    assert not hasattr(model.get_submodule(MODULE), "outlier_columns")


def test_commands(made, llama):
    out = str(made[0] / "out")
    for arguments in (
        ("info", out),
        ("estimate-memory", out),
        ("generate", out, "Once", "--max-new-tokens", "4", "--device", "cpu"),
    ):
        done = run_cli(*arguments, cwd=made[0])
        assert done.returncode == 0 and not done.stderr.count("warning"), done.stderr


def test_what_cannot_be(llama, tmp_path, text):  # noqa: F811
    plan = make_plan(str(llama), tmp_path / "out", bits=8, calibrate=True, text=text)
    assert any("outlier_share" in problem and "8" in problem for problem in plan.problems)
    with pytest.raises(UsageError, match="outlier_share is 0.9"):
        make_plan(str(llama), tmp_path / "out", bits=8, calibrate=True, settings={"outlier_share": "0.9"})
    with pytest.raises(UsageError, match="texts"):
        qcli.load(str(llama), bits=8, settings={"outlier_share": "0.25"})
