"""Statistics gathered once: the same bytes as a run that gathers by itself, and what does not fit is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import qcli
from qcli.calibration.stored import StoredStatistics
from qcli.errors import CheckpointError, PlanError, QcliError, UsageError
from qcli.quantization.quantize import make_plan
from tests.models import add_tokenizer, make_model
from tests.quantization.test_calibrated import STORY, digest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a text, and the statistics of both, as a run with another method has saved them."""
    folder = tmp_path_factory.mktemp("statistics")
    make_model("llama", folder / "model")
    add_tokenizer(folder / "model")
    (folder / "text.txt").write_text("".join(f"{i} {STORY[i % 60 :]}" for i in range(60)))
    run(folder, folder / "first", save_statistics=folder / "kept.safetensors", method="fp8")
    return folder


def run(folder: Path, output: Path, **options):
    return qcli.quantize(
        str(folder / "model"), output, calibrate=True, **({"text": folder / "text.txt", "tokens": 1500, "check": False} | options)
    )


def without_report(folder):
    return {name: found for name, found in digest(folder).items() if name not in ("README.md", "qcli.json")}


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        {"method": "rtn", "group_size": 32, "settings": {"rounding": "nearest", "transform": "none"}},
        {"bits": 8, "settings": {"outlier_share": "0.2"}},
        {"method": "smoothquant"},
    ],
    ids=["nf4", "moments alone", "llm-int8", "smoothquant"],
)
def test_the_same_bytes_as_a_run_that_gathers(options, folder, tmp_path):
    run(folder, tmp_path / "own", **options)
    report = run(folder, tmp_path / "stored", statistics=folder / "kept.safetensors", **options)
    assert without_report(tmp_path / "own") == without_report(tmp_path / "stored")
    assert report.calibration.tokens == 1500


def test_any_reader_of_safetensors_opens_it(folder):
    """q, k and v share one input, gate and up another: four a block."""
    with safe_open(folder / "kept.safetensors", "pt") as file:
        names = set(file.keys())
        hessian, square = file.get_tensor("0.hessian"), file.get_tensor("0.square")
    assert len({name.split(".")[0] for name in names}) == 8
    torch.testing.assert_close(hessian.diagonal().double(), square, rtol=1e-4, atol=1e-5)
    assert torch.equal(hessian, hessian.t())
    assert not list(folder.glob("*.tmp"))


def test_a_resumed_run_saves_all_of_it(folder, tmp_path, monkeypatch):
    from qcli.quantization import staging

    monkeypatch.setattr(staging.Staging, "publish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out", method="fp8")
    monkeypatch.undo()
    run(folder, tmp_path / "out", method="fp8", save_statistics=tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (folder / "kept.safetensors").read_bytes()


def test_what_fails_leaves_no_file(folder, tmp_path, monkeypatch):
    from qcli.quantization import calibrating

    monkeypatch.setattr(calibrating, "round_weight", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out", save_statistics=tmp_path / "half.safetensors", method="fp8")
    assert not list(tmp_path.glob("half*"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tokens": 1400}, "was gathered with tokens 1500, and this run has 1400"),
        ({"check": True}, "was gathered with held_out False"),
        ({"text": "other.txt"}, "was gathered from another text"),
    ],
)
def test_other_texts_are_refused(options, message, folder, tmp_path):
    (tmp_path / "other.txt").write_text(STORY * 60)
    if "text" in options:
        options = {"text": tmp_path / "other.txt"}
    with pytest.raises(PlanError, match=message):
        run(folder, tmp_path / "out", bits=4, statistics=folder / "kept.safetensors", **options)


def test_another_model_is_refused(folder, tmp_path):
    make_model("llama", tmp_path / "model", torch.float16)
    add_tokenizer(tmp_path / "model")
    shutil.copy(folder / "text.txt", tmp_path)
    with pytest.raises(PlanError, match="was gathered from another model"):
        run(tmp_path, tmp_path / "out", bits=4, statistics=folder / "kept.safetensors")


def test_modules_that_were_not_watched(folder, tmp_path):
    run(folder, tmp_path / "first", save_statistics=tmp_path / "some.safetensors", method="fp8", skip=["*.0.mlp.*"])
    with pytest.raises(PlanError, match="3 modules have no statistics in .*model.layers.0.mlp.gate_proj"):
        run(folder, tmp_path / "out", bits=4, statistics=tmp_path / "some.safetensors")
    run(folder, tmp_path / "out", bits=4, statistics=tmp_path / "some.safetensors", skip=["*.0.mlp.*"])


@pytest.mark.parametrize("place", ["data", "end", "header", "other"])
def test_a_damaged_file_is_refused(place, folder, tmp_path):
    data = bytearray((folder / "kept.safetensors").read_bytes())
    if place == "data":
        at = StoredStatistics(folder / "kept.safetensors").header.tensors["3.hessian"].start
        data[at + 5] ^= 1
    elif place == "end":
        del data[-10:]
    elif place == "header":
        data = bytearray(data.replace(b'\\"groups\\"', b'\\"gruppe\\"', 1))
    else:
        data = bytearray((folder / "model" / "model.safetensors").read_bytes())
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises((CheckpointError, PlanError)) as found:
        run(folder, tmp_path / "out", bits=4, statistics=tmp_path / "bad.safetensors")
    assert "bad.safetensors" in str(found.value)
    assert not (tmp_path / "out").exists()


def test_options_that_do_not_go_together(folder, tmp_path):
    model, file = str(folder / "model"), folder / "kept.safetensors"
    with pytest.raises(UsageError, match="order=sequential needs those of rounded blocks"):
        make_plan(model, tmp_path / "o", bits=4, calibrate=True, statistics=file, settings={"order": "sequential"})
    with pytest.raises(UsageError, match="both given"):
        make_plan(model, tmp_path / "o", bits=4, calibrate=True, statistics=file, save_statistics=tmp_path / "x")
    with pytest.raises(QcliError, match="there is no folder"):
        make_plan(model, tmp_path / "o", bits=4, calibrate=True, save_statistics=tmp_path / "none" / "x")
    plan = make_plan(model, tmp_path / "o", bits=4, save_statistics=tmp_path / "x")
    assert any("without --calibrate" in problem for problem in plan.problems)
    with pytest.raises(CheckpointError, match="cannot read"):
        make_plan(model, tmp_path / "o", bits=4, calibrate=True, statistics=tmp_path / "none.safetensors")


def test_a_disk_too_small_is_a_problem_of_the_plan(folder, tmp_path, monkeypatch):
    from qcli.quantization import calibration_needs

    monkeypatch.setattr(calibration_needs.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    plan = make_plan(str(folder / "model"), tmp_path / "o", bits=4, calibrate=True, save_statistics=tmp_path / "x")
    assert any("x would take" in problem and "1.00 kB are free" in problem for problem in plan.problems)
