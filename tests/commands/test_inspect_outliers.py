"""`qcli inspect-outliers` as its users meet it: tables, files, what is refused, and what quantize takes from a report."""

import csv
import json

import pytest

from tests.conftest import ROOT
from tests.outliers.planted import plant, save, small_llama, write_text

DEMO, STORIES = ROOT / "examples/demo-model", ROOT / "examples/stories.jsonl"


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    save(plant(small_llama(), {5: 40.0, 23: 20.0}), folder)
    write_text(folder / "text.txt", 300)
    return folder


@pytest.fixture
def inspect(quick_cli, planted):
    return lambda *options: quick_cli(
        "inspect-outliers", planted, "--text", planted / "text.txt", "--sequence-length", 32, *options
    )


def test_tables(quick_cli):
    done = quick_cli("inspect-outliers", DEMO, "--text", STORIES, "--tokens", 600, "--ablate")
    assert done.returncode == 0, done.stderr
    text = done.stdout
    for heading in (
        "the residual stream that leaves each block",
        "SQNR of the outputs",
        "dimensions of the hidden state",
        "Table 4",
        "zeroed at",
    ):
        assert heading in text
    for words in ("demo-model", "GPT-J", "kurtosis", "llm-int8", "Recommendation", "No massive activations"):
        assert words in text
    row = next(line for line in text.splitlines() if line.split()[:2] == ["demo-model", "1.37M"])
    assert row.split()[3] == "4" and "100%" in row
    assert f"next: qcli quantize {DEMO} --bits 8" in text


def test_json_csv_page_and_figure(inspect, tmp_path):
    done = inspect("--json", "--csv", "out.csv", "--report", "out.html", "--plot", "out.png")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {f["dim"] for f in report["features"] if f["outlier"]} == {5, 23}
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20 and rows[0]["site"] == "attention input" and rows[4]["site"] == "residual stream"
    assert float(rows[0]["kurtosis"]) == report["layers"][0]["sites"][0]["kurtosis"]
    assert (tmp_path / "out.html").stat().st_size > 1_000_000
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert [line for line in done.stderr.splitlines() if line.startswith("wrote")] == [
        "wrote out.csv",
        "wrote out.html",
        "wrote out.png",
    ]


def test_quantize_leaves_what_a_report_recommends(inspect, quick_cli, planted, tmp_path):
    report = json.loads(inspect("--json").stdout)
    report["recommendation"]["skip"] = ["model.layers.1.mlp.down_proj"]
    (tmp_path / "report.json").write_text(json.dumps(report))
    done = quick_cli("quantize", planted, "--bits", 8, "--output", "out", "--skip-from", "report.json", "--skip", "*.q_proj")
    assert done.returncode == 0, done.stderr
    skipped = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert "model.layers.1.mlp.down_proj" in skipped and "model.layers.0.self_attn.q_proj" in skipped
    assert "model.layers.2.mlp.down_proj" not in skipped


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "cannot read the report report.json: No such file"),
        ("{", "report.json is not valid JSON"),
        ('{"format": "other"}', "its format is 'other', expected 'qcli-outliers'"),
        ('{"format": "qcli-outliers", "recommendation": null}', "holds no recommendation"),
    ],
)
def test_reports_that_are_none(quick_cli, planted, tmp_path, content, words):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    done = quick_cli("quantize", planted, "--skip-from", "report.json")
    assert done.returncode == 2 and words in done.stderr


@pytest.mark.parametrize(
    "options, code, words",
    [
        (("--csv", "missing/out.csv"), 1, "there is no folder missing"),
        (("--report", "."), 1, ". is a folder"),
        (("--plot", "out.gif"), 2, "out.gif"),
        (("--threshold", "-1"), 2, "--threshold is -1.0, expected a number above 0"),
        (("--tokens", "1"), 2, "--tokens is 1, expected 2 or more"),
        (("--tokens", "99999"), 2, "text.txt holds 300 tokens, and --tokens asks for 99,999"),
        (("--dtype", "int8"), 2, "dtype is 'int8'"),
    ],
)
def test_bad_options(inspect, options, code, words):
    done = inspect(*options)
    assert done.returncode == code and words in done.stderr and not done.stdout, done.stderr


@pytest.mark.parametrize(
    "option",
    [("--text", STORIES), ("--tokens", 10), ("--sequence-length", 32), ("--ablate",), ("--report", "a.html"), ("--plot", "a.png")],
)
def test_options_of_a_run_are_refused_where_nothing_runs(quick_cli, option):
    done = quick_cli("inspect-outliers", DEMO, "--weights-only", *option)
    assert done.returncode == 2 and f"{option[0]} was given with --weights-only" in done.stderr and not done.stdout


def test_weights_only(quick_cli, tmp_path):
    done = quick_cli("inspect-outliers", DEMO, "--weights-only", "--csv", "weights.csv")
    assert done.returncode == 0, done.stderr
    assert "Norm gains" in done.stdout and "nf4" in done.stdout
    with open(tmp_path / "weights.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 42 + 13
    assert json.loads(quick_cli("inspect-outliers", DEMO, "--weights-only", "--json").stdout)["format"] == "qcli-weights"


def test_an_interrupt_leaves_no_file(inspect, tmp_path, monkeypatch):
    """Ctrl-C while a block is passed: exit code 130, one sentence, nothing written."""
    from qcli.outliers.measure import Meter

    seen = Meter._seen

    def interrupt(self, site, module, x, first):
        if self._unit.index == 2:
            raise KeyboardInterrupt
        seen(self, site, module, x, first)

    monkeypatch.setattr(Meter, "_seen", interrupt)
    done = inspect("--csv", "out.csv", "--report", "out.html", "--plot", "out.png")
    assert done.returncode == 130 and done.stderr.strip().endswith("error: interrupted") and not done.stdout
    assert not list(tmp_path.glob("out*"))
