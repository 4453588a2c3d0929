"""The script for a lent GPU, on steps that stand in for its own: when it stops, what it writes, what it ends."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qcli.runtime import cuda
from tests.conftest import ROOT
from tests.emulator.emulator import Emulator, missing
from tests.gpu import first, sanitizer
from tests.test_gpu_checks import ends

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_first  # noqa: E402
from gpu_first import FAILED, LATE, PASSED, SKIPPED, WRONG, Step  # noqa: E402


def script(name: str, code: str, seconds: int = 60, **options) -> Step:
    return Step(name, lambda folder: [sys.executable, "-c", code], seconds, **options)


def run(folder: Path, *steps: Step, minutes: float | None = None) -> tuple[int, dict]:
    """Exit code, and summary.json."""
    code = gpu_first.run(list(steps), folder, minutes)
    return code, json.loads((folder / "summary.json").read_text())


@pytest.fixture(autouse=True)
def nvidia_smi(tmp_path_factory, monkeypatch):
    """One that knows a GPU, and steps of the names below."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H100, 580.1, 9.0, 81559 MiB, 1980 MHz, 2619 MHz, 700.00 W'\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(gpu_first, "STEPS", tuple(script(name, "") for name in ("one", "two", "three", "four")))


def test_logs_figures_and_versions(tmp_path):
    said = "3 passed, 1 skipped in 2.00s (0:00:02)\nat exit"
    counts = script("one", f"print({said!r})", proves=True, read=gpu_first.tests_passed)
    code, summary = run(tmp_path, counts, script("two", "import sys; print('to err', file=sys.stderr)"))
    assert code == 0
    assert (tmp_path / "one.log").read_text() == f"{said}\n"
    assert (tmp_path / "two.log").read_text() == "to err\n"
    one = summary["steps"]["one"]
    assert (one["status"], one["figures"], one["gpu"]) == (PASSED, {"passed": 3, "skipped": 1}, "NVIDIA H100")
    assert summary["machine"]["gpu"]["driver_version"] == "580.1"
    assert torch.__version__.startswith(summary["machine"]["torch"])
    assert str(ROOT) not in json.dumps(summary) and str(tmp_path) not in json.dumps(summary)


def test_it_stops_at_the_first_wrong_number(tmp_path):
    wrong = script("two", "print('expected 1, found 2'); raise SystemExit(1)", proves=True)
    code, summary = run(tmp_path, script("one", ""), wrong, script("three", ""))
    assert code == 1 and list(summary["steps"]) == ["one", "two"]
    assert summary["steps"]["two"]["status"] == WRONG
    assert summary["steps"]["two"]["why"] == "exit code 1: expected 1, found 2"


def test_a_benchmark_that_fails_stops_nothing(tmp_path):
    code, summary = run(tmp_path, script("one", "raise SystemExit(3)"), script("two", ""))
    assert code == 0
    assert [note["status"] for note in summary["steps"].values()] == [FAILED, PASSED]


def test_no_test_is_no_proof(tmp_path):
    """Where torch sees no GPU all tests are skipped, and pytest is content."""
    step = script("one", "print('12 skipped in 0.10s')", proves=True, read=gpu_first.tests_passed)
    code, summary = run(tmp_path, step, script("two", ""))
    assert code == 1 and summary["steps"]["one"]["why"] == "no test ran"


def test_a_step_has_its_time_and_takes_its_children_along(tmp_path):
    """What it has printed until then is kept; the next one is tried, unless nothing is worth it without this one."""
    slow = script(
        "one", "import os, time\nprint('begun', flush=True)\nprint(os.fork(), flush=True)\ntime.sleep(1000)", 2, proves=True
    )
    code, summary = run(tmp_path, slow, script("two", ""))
    assert code == 0
    assert [note["status"] for note in summary["steps"].values()] == [LATE, PASSED]
    begun, *processes = (tmp_path / "one.log").read_text().split()
    assert begun == "begun" and len(processes) == 2  # the fork says its child's number to itself, and 0 to the child
    assert ends(max(map(int, processes)))
    code, summary = run(tmp_path, replace(slow, vital=True), script("two", ""))
    assert code == 1 and summary["steps"]["one"]["status"] == LATE


def test_a_step_that_ends_leaves_nothing_running(tmp_path):
    run(tmp_path, script("one", "import os, time\nchild = os.fork()\nprint(child) if child else time.sleep(1000)"))
    assert ends(int((tmp_path / "one.log").read_text()))


def test_no_step_begins_that_may_not_be_done(tmp_path, capsys):
    steps = script("one", "", 30), script("two", "", 60), script("three", "", 10)
    code, summary = run(tmp_path, *steps, minutes=1)
    assert code == 0 and list(summary["steps"]) == ["one"]
    assert "go on with --from two" in capsys.readouterr().out
    code, summary = run(tmp_path, *steps[1:])
    assert list(summary["steps"]) == ["one", "two", "three"]  # the earlier call's are kept


def test_the_command_line(tmp_path, monkeypatch, capsys):
    def main(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["gpu_first.py", "--output", str(tmp_path / "out"), *options])
        with pytest.raises(SystemExit) as stopped:
            gpu_first.main()
        return stopped.value.code

    steps = lambda: list(json.loads((tmp_path / "out" / "summary.json").read_text())["steps"])  # noqa: E731
    assert main("--from", "three") == 0 and steps() == ["three", "four"]
    assert main("--only", "one,four") == 0 and steps() == ["one", "three", "four"]
    assert main("--minutes", "0.5") == 0 and "go on with --from one" in capsys.readouterr().out
    assert main("--only", "five") == 2 and "--only five: expected some of one,two,three,four" in capsys.readouterr().err
    (tmp_path / "none-1-py3-none-any.whl").write_text("not a wheel")
    assert main("--wheels", str(tmp_path)) == 1 and steps()[0] == "install"


def test_what_a_step_needs(tmp_path):
    code, summary = run(tmp_path, script("one", "", needs="no-such-program"), script("two", ""))
    assert code == 0
    assert summary["steps"]["one"] | {"gpu": None} == {
        "status": SKIPPED,
        "seconds": 0.0,
        "why": "no-such-program is not on PATH",
        "gpu": None,
    }


NCU = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","linear_4bit(const __nv_bfloat16 *, int)","GPU Speed Of Light Throughput","DRAM Throughput","%","71.5"
"0","1","linear_4bit(const __nv_bfloat16 *, int)","Occupancy","Block Limit Shared Mem","block","2"
"1","1","linear_int8(const __nv_bfloat16 *, int)","GPU Speed Of Light Throughput","DRAM Throughput","%","60.2"
"""


def test_figures_of_the_profiler_and_of_the_benchmark(tmp_path):
    (tmp_path / "ncu.csv").write_text(NCU)
    assert gpu_first.profile("", tmp_path)["launches"] == [
        {"kernel": "linear_4bit", "DRAM Throughput [%]": "71.5", "Block Limit Shared Mem [block]": "2"},
        {"kernel": "linear_int8", "DRAM Throughput [%]": "60.2"},
    ]
    (tmp_path / "ncu.csv").write_text("==ERROR== no permission\n")
    with pytest.raises(ValueError, match="no table"):
        gpu_first.profile("", tmp_path)
    (tmp_path / "few.json").write_text('{"ceilings": {}, "rows": [1], "seconds": {}, "failed": [], "machine": {}}')
    assert gpu_first.benchmark("few")("", tmp_path)["rows"] == [1]


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_the_benchmark_on_its_stand_in(tmp_path):
    command = gpu_first.python("benchmarks/gpu.py", "--stand-in", "--only", "launch", "--output", "FOLDER/some.json")
    step = Step("one", command, 120, read=gpu_first.benchmark("some"))
    _, summary = run(tmp_path, step)
    one = summary["steps"]["one"]
    assert one["status"] == PASSED and one["seconds"] > 0
    assert one["figures"]["ceilings"]["copy"] > 0 and one["figures"]["rows"]


def test_a_wrong_exit_code_counts_before_the_figures(tmp_path):
    step = script("one", "print('1 failed, 2 passed in 1s'); raise SystemExit(1)", proves=True, read=gpu_first.tests_passed)
    code, summary = run(tmp_path, step)
    assert code == 1 and summary["steps"]["one"]["figures"]["failed"] == 1


def test_the_steps_are_those_that_there_are(monkeypatch):
    """Files, parts and modules that the commands name; and a call of ten minutes has time for each."""
    monkeypatch.undo()
    import gpu

    for step in gpu_first.STEPS:
        words = step.command(Path("out"))
        assert all((ROOT / word).exists() for word in words if word.endswith(".py")), step.name
        assert all(words.index("-m") for word in words if word == "tests.gpu.first")
        if "--only" in words:
            assert set(words[words.index("--only") + 1].split(",")) <= set(gpu.PARTS)
        assert step.seconds <= 540
    assert {step.name for step in gpu_first.STEPS} > set(sanitizer.TOOLS)


@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_the_first_products_on_the_emulator(emulated, capsys, monkeypatch):
    torch.manual_seed(0)
    with cuda.using(Emulator(emulated)):
        assert first.check(torch.device("cpu"), (48, 256)) is None
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 8 and all(line.endswith("agrees") for line in lines)
        assert "linear_4bit, 32 tokens, 48x256 (linear_4bit_batch): agrees" in lines
        monkeypatch.setattr(first, "wrong_in_rows", lambda *_: "result 0 differs")
        assert first.check(torch.device("cpu"), (48, 256)) == "result 0 differs"
    monkeypatch.undo()
    with cuda.using(None):  # the reference in the kernels' place proves nothing
        monkeypatch.setattr(first, "wrong_in_rows", lambda *_: None)
        assert "no kernel" in first.check(torch.device("cpu"), (48, 256))
