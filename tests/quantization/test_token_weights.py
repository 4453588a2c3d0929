"""Calibration in which tokens count by gradients, from end to end."""

import json
import multiprocessing
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

import qcli
from qcli.quantization import shard_files, staging
from qcli.quantization.quantize import make_plan
from qcli.quantization.room import calibration_memory
from tests.conftest import ROOT
from tests.models import add_tokenizer, make_model
from tests.quantization.test_calibrated import STORY, digest

DEMO = ROOT / "examples" / "demo-model"
SEARCHED = {"method": "nf4", "settings": {"search": "imatrix", "weights": "fisher"}}
WEIGHED = {"bits": 4, "calibrate": True, "settings": {"weights": "fisher"}}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text("".join(f"{i} {STORY[i % 60 :]}" for i in range(60)))
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "model"
    make_model("llama", folder)
    add_tokenizer(folder)
    return folder


def test_it_gains_on_the_demo_model(tmp_path, text):
    found = qcli.quantize(str(DEMO), tmp_path / "out", text=text, **WEIGHED).calibration
    assert found.checked.kl < 0.4 * found.checked.plain_kl and found.seconds["gradients"] > 0
    assert json.loads((tmp_path / "out" / "qcli.json").read_text())["options"]["weights"] == "fisher"


@pytest.mark.parametrize("options", [SEARCHED, WEIGHED])
def test_gradients_decide(options, llama, tmp_path, text):
    """The search of scales and GPTQ."""
    for name, weights in (("fisher", "fisher"), ("none", "none")):
        settings = options["settings"] | {"weights": weights}
        qcli.quantize(str(llama), tmp_path / name, text=text, tokens=1500, **options | {"settings": settings})
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("fisher", "none"))
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert len({name.split("proj")[0] for name in different if "proj" in name}) == 14


def test_threads_do_not_matter(llama, tmp_path, text):
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            qcli.quantize(str(llama), tmp_path / f"out{threads}", text=text, tokens=1500, **WEIGHED)
    finally:
        torch.set_num_threads(before)
    assert digest(tmp_path / "out1") == digest(tmp_path / "out3")


def killed(folder, text, after):
    """In a process of its own: quantizes, and kills itself once so many units are journalled."""
    os.chdir(folder)
    shard_files.SYNC_SECONDS = 0
    finish = staging.Staging.finish_work

    def finish_work(self, index, errors):
        finish(self, index, errors)
        if len(self.done) >= after:
            os.kill(os.getpid(), signal.SIGKILL)

    staging.Staging.finish_work = finish_work
    qcli.quantize("model", "out", text=text, tokens=1500, **WEIGHED)


@pytest.mark.parametrize("after", [4, 13])
def test_kill_and_rerun(after, llama, tmp_path, text, monkeypatch):
    """Some of the modules that read one input are written, and weigh their tokens again for the others."""
    qcli.quantize(str(llama), tmp_path / "whole", text=text, tokens=1500, **WEIGHED)
    (tmp_path / "model").symlink_to(llama)
    process = multiprocessing.get_context("spawn").Process(target=killed, args=(tmp_path, text, after))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "out").exists()
    monkeypatch.chdir(tmp_path)
    qcli.quantize("model", "out", text=text, tokens=1500, **WEIGHED)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_it_is_planned(llama, tmp_path, text):
    plan = make_plan(str(llama), tmp_path / "out", bits=4, settings={"weights": "fisher"})
    assert any("add --calibrate" in problem for problem in plan.problems)
    plan = make_plan(str(llama), tmp_path / "out", text=text, tokens=1500, **WEIGHED)
    assert plan.problems == []
    plain = make_plan(str(llama), tmp_path / "out", text=text, tokens=1500, bits=4, calibrate=True)
    assert calibration_memory(plan) > calibration_memory(plain) and plan.identity != plain.identity
