"""The script behind make test-vllm, without vLLM: its verdicts, its forks, and what its committed result says of plans and docs."""

import importlib
import json
import os
import re
import time
from pathlib import Path

import pytest

from benchmarks import vllm_formats as script
from qcli.quantization.quantize import make_plan
from tests.conftest import ROOT
from tests.test_docs import rows

DEMO = str(ROOT / "examples/demo-model")
RESULT = json.loads((ROOT / "benchmarks/results/vllm-cpu.json").read_text())


def test_the_result_is_of_the_locked_versions_and_of_all_checkpoints():
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "locks/vllm.txt").read_text(), re.M))
    assert RESULT["vllm"] == {name: locked[name] for name in RESULT["vllm"]}
    assert {row["verdict"] for row in RESULT["rows"]} <= {"as expected", "not judged"}
    expected = {(model, script.UNQUANTIZED) for model in script.EVERY}
    expected |= {(model, name) for name, case in script.CASES.items() for model in case.models}
    assert {(row["model"], row["checkpoint"]) for row in RESULT["rows"]} == expected


def test_plans_name_what_vllm_refused_and_nothing_else(tmp_path):
    refused = {row["checkpoint"] for row in RESULT["rows"] if "error" in row}
    for name, case in script.CASES.items():
        notes = [note for note in make_plan(DEMO, tmp_path / "out", **case.options).notes if "vLLM" in note]
        of_rows = [note for note in notes if "rows of 320" in note]
        of_awq = [note for note in notes if "bfloat16 too" in note]
        assert bool(set(notes) - {*of_rows, *of_awq}) == (name in refused), (name, notes)
        assert bool(of_rows) == (name == "rtn, rows") and bool(of_awq) == (name.startswith("awq") and "float16" not in name)


def test_the_tables_of_the_docs_are_the_results():
    found: dict[str, dict[str, str]] = {}
    for row in RESULT["rows"]:
        found.setdefault(row["checkpoint"], {})[row["model"]] = f"{row['d']:.3f}" if "d" in row else row["error"]
    wide = {name: [of.get(model, "") for model in ("llama", "qwen3", "demo")] for name, of in found.items() if len(of) > 1}
    assert {cells[0]: cells[1:] for cells in rows(ROOT / "docs/formats.md", "checkpoint |")} == wide
    refused = {name: of["llama"] for name, of in found.items() if not of["llama"].startswith("0.")}
    shown = {name: words for names, words in rows(ROOT / "docs/formats.md", "refused") for name in names.split("; ")}
    assert shown.keys() == refused.keys()
    assert all(words.replace("`", "") in refused[name] for name, words in shown.items())


@pytest.mark.parametrize(
    "name, row, amx, environment, expected",
    [
        ("unquantized", {"d": 0.05}, False, {}, "as expected"),
        ("unquantized", {"error": "ValueError: no"}, False, {}, "does not run"),
        ("nf4", {"d": 0.2, "rolled": 9.0}, False, {}, "as expected"),
        ("nf4", {"d": 0.21, "rolled": 9.0}, False, {}, "d is above the limit"),
        ("nf4", {"d": 0.1, "rolled": 0.2}, False, {}, "rolled weights are below the limit: no proof"),
        ("nf4", {"error": "ValueError: no"}, False, {}, "expected: runs"),
        ("mxfp4", {"d": 0.1, "rolled": 9.0}, False, {}, "expected: Failed to find a kernel that can implement the MXFP4"),
        ("nvfp4", {"error": "ValueError: Marlin FP4 not available"}, False, {}, "as expected"),
        ("nvfp4", {"error": "ValueError: no"}, False, {}, "expected: Marlin FP4 not available"),
        ("rtn, groups of 64", {"d": 0.4, "rolled": 9.0}, True, {}, "as expected"),
        ("rtn, groups of 64", {"d": 0.4, "rolled": 9.0}, True, {"VLLM_CPU_INT4_W4A8": "0"}, "d is above the limit"),
        ("rtn, rows", {"error": "RuntimeError: shape"}, True, {}, "not judged"),
    ],
)
def test_verdicts(name, row, amx, environment, expected):
    job = script.Job("llama", name, Path("somewhere"), environment)
    assert script.verdict(job, row, {"llama": 0.05}, amx) == expected


def sleep(job):
    time.sleep(60)


def fail(job):
    raise ValueError("a shape\n  is wrong")


@pytest.mark.parametrize(
    "work, expected",
    [
        (lambda job: {"tokens": [[job["folder"]]]}, {"tokens": [["m"]]}),
        (fail, {"error": "ValueError: a shape is wrong"}),
        (lambda job: os._exit(3), {"error": "the process ended with 3"}),
        (sleep, {"error": "no output in 1 s"}),
    ],
    ids=["text", "error", "crash", "hangs"],
)
def test_a_fork_that_fails_costs_its_own_job(work, expected, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))  # the module, when it is loaded, and its forks change it
    vllm_run = importlib.import_module("benchmarks.vllm_run")
    monkeypatch.setattr(vllm_run, "generate", work)
    found = vllm_run.run({"folder": "m", "environment": {}, "seconds": 1})
    assert found.pop("seconds") < 30 and found == expected
