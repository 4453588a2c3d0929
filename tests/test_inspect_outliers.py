"""`qcli inspect-outliers` on the command line: options that do not go together, and a run that is interrupted."""

import json
import os
import signal

import pytest

from tests.conftest import ROOT

DEMO = ROOT / "examples/demo-model"
STORIES = ROOT / "examples/stories.jsonl"


@pytest.mark.parametrize(
    "option",
    [("--text", STORIES), ("--tokens", 10), ("--sequence-length", 32), ("--ablate",), ("--report", "a.html"), ("--plot", "a.png")],
)  # fmt: skip
def test_options_of_a_run_are_refused_where_nothing_runs(quick_cli, option):
    done = quick_cli("inspect-outliers", DEMO, "--weights-only", *option)
    assert done.returncode == 2 and f"{option[0]} was given with --weights-only" in done.stderr and not done.stdout


def test_tables_json_and_csv_tell_the_same(quick_cli, tmp_path):
    arguments = ("inspect-outliers", DEMO, "--text", STORIES, "--tokens", 300, "--device", "cpu")
    shown = quick_cli(*arguments, "--csv", "out.csv").stdout
    found = json.loads(quick_cli(*arguments, "--json").stdout)
    assert found["recommendation"]["command"] in shown and found["table4"]["stage"] in shown
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert len(lines) == 1 + sum(len(layer["sites"]) for layer in found["layers"])


def test_an_interrupted_run_leaves_no_file(quick_cli, tmp_path, monkeypatch):
    """Ctrl-C while a block computes."""
    from qcli.outliers.measure import Meter

    def interrupt(*arguments):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Meter, "_left", interrupt)
    files = ("--csv", "out.csv", "--report", "out.html", "--plot", "out.png")
    done = quick_cli("inspect-outliers", DEMO, "--text", STORIES, "--tokens", 100, "--device", "cpu", *files)
    assert done.returncode == 130 and "interrupted" in done.stderr and not done.stdout
    assert not list(tmp_path.iterdir())
