"""Rows of calibrated forms: they are what `quantize --calibrate` writes, and no token is calibrated on and scored."""

import json

import pytest
import torch
from safetensors.torch import load_file

import qcli
from qcli.errors import UsageError
from qcli.evaluation import calibrated
from qcli.runtime import cpu
from qcli.schemes import NAMED
from qcli.streaming.corpus import read_windows
from qcli.streaming.skeleton import Skeleton
from tests.conftest import ROOT
from tests.models import add_tokenizer, make_model

DEMO = ROOT / "examples/demo-model"
STORIES = [json.loads(line)["text"] for line in (ROOT / "examples/stories.jsonl").read_text().splitlines()[:30]]
SCORED = 8  # documents


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return Skeleton(DEMO, dtype="float32").tokenizer


@pytest.fixture(scope="module")
def texts(tmp_path_factory, tokenizer):
    """(all, what is scored, what follows, tokens of the second)."""
    folder = tmp_path_factory.mktemp("text")
    scored = write(folder / "scored.jsonl", STORIES[:SCORED])
    count = read_windows(tokenizer, scored).tokens
    return write(folder / "all.jsonl", STORIES), scored, write(folder / "rest.jsonl", STORIES[SCORED:]), count


@pytest.fixture(scope="module")
def measured(texts):
    """Rows by name, and the weights that were simulated by name and module."""
    names = ["nf4", "nf4-calibrated", "LLM.int8() calibrated", "rtn-calibrated", "fp8-calibrated"]
    weights, simulated = {}, calibrated.CalibratedMethods.simulated

    def noted(self, name, linear, weight):
        found = simulated(self, name, linear, weight)
        weights[name, linear.module] = found.weight
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrated.CalibratedMethods, "simulated", noted)
        result = qcli.evaluate(str(DEMO), methods=names, text=texts[0], tokens=texts[3], device="cpu")
    assert result.protocol.scored == texts[3] and any("not scored" in note for note in result.notes)
    return {row.name: row for row in result.rows}, weights


@pytest.mark.parametrize("method", ["nf4", "llm-int8", "rtn", "fp8"])
def test_a_row_is_what_quantize_writes(method, measured, texts, tmp_path, monkeypatch):
    """The weights, and but for the rounding of other kernels what the model then predicts."""
    monkeypatch.setattr(cpu, "native_bfloat16", lambda: False)  # else quantize gathers statistics in bfloat16
    settings = {"transform": "none"} if method in ("nf4", "rtn") else {}
    options = {"method": method, "settings": settings, "calibrate": True, "check": False}
    qcli.quantize(str(DEMO), tmp_path / "out", text=texts[2], **options)
    qcli.dequantize(str(tmp_path / "out"), tmp_path / "whole", dtype="float32")
    written = load_file(tmp_path / "whole" / "model.safetensors")
    rows, weights = measured
    ours = {module: weight for (name, module), weight in weights.items() if name == f"{method}-calibrated"}
    assert len(ours) == 42
    for module, weight in ours.items():
        assert (weight == written[f"{module}.weight"]).float().mean() > 0.999, module
    expected = qcli.evaluate(str(tmp_path / "out"), against=str(DEMO), text=texts[1], dtype="float32", device="cpu").rows[1]
    found = rows[f"{method}-calibrated"]
    assert found.quality.tokens == expected.quality.tokens
    assert found.quality.loss.value == pytest.approx(expected.quality.loss.value, rel=1e-3)
    assert found.against.divergence.mean.value == pytest.approx(expected.against.divergence.mean.value, rel=0.4)
    assert found.bits_per_weight == pytest.approx(expected.bits_per_weight, rel=0.01)


def test_other_rows_are_as_they_are_without(measured, texts):
    result = qcli.evaluate(str(DEMO), methods="nf4", text=texts[0], tokens=texts[3], device="cpu")
    rows = measured[0]
    for row in result.rows:
        assert row.quality == rows[row.name].quality and row.against == rows[row.name].against
    assert rows["nf4-calibrated"].against.divergence.mean.value < 0.1 * rows["nf4"].against.divergence.mean.value
    assert not result.notes


@pytest.mark.parametrize("stride", [None, 16])
def test_what_is_calibrated_on_follows_what_is_scored(stride, texts, tokenizer):
    options = {"sequence_length": 48, "model_limit": 512}
    whole = read_windows(tokenizer, texts[0], **options)
    prefix = len(whole.prefix)

    def ids(windows):
        return [token for window in windows for token in window.ids[prefix:]]

    for tokens in (None, 700):
        scored, rest = calibrated.read_both(tokenizer, texts[0], tokens, stride=stride, **options)
        assert scored.tokens == (tokens or whole.tokens * 2 // 3) and rest.tokens == whole.tokens - scored.tokens
        unscored = read_windows(tokenizer, texts[0], tokens=scored.tokens, **options)
        assert ids(unscored.windows) + ids(rest.windows) == ids(whole.windows)
        assert scored.scored == scored.tokens
    few = whole.tokens - calibrated.FEWEST_TOKENS
    assert calibrated.read_both(tokenizer, texts[0], few, stride=stride, **options)[1].tokens == calibrated.FEWEST_TOKENS
    with pytest.raises(UsageError, match=f"255 tokens of all.jsonl follow the {few + 1:,} that are scored"):
        calibrated.read_both(tokenizer, texts[0], few + 1, stride=stride, **options)


def test_bytes_of_a_document_that_is_cut_add_up(texts, tokenizer):
    whole = read_windows(tokenizer, texts[0])
    parts = [read_windows(tokenizer, texts[0], tokens=333), read_windows(tokenizer, texts[0], passed_over=333)]
    assert sum(part.scored_bytes for part in parts) == whole.scored_bytes
    assert sum(part.tokens for part in parts) == whole.tokens


def test_names():
    schemes, forms = calibrated.chosen("rtn, NF4 calibrated,nf4")
    assert [scheme.name for scheme in schemes] == ["unquantized", "nf4", "nf4-calibrated", "rtn"]
    assert forms["nf4-calibrated"].rounding == "gptq" and forms["nf4-calibrated"].transform == "none"
    schemes, forms = calibrated.chosen(["all", "llm-int8-calibrated"])
    assert set(forms) == {"llm-int8-calibrated"} and len(schemes) == len(calibrated.chosen("all")[0]) + 1
    assert not calibrated.chosen("all")[1]
    for name in ("int8-calibrated", "kmeans-calibrated", "awq-calibrated", "llm-int8-paper-calibrated", "unquantized-calibrated"):
        with pytest.raises(UsageError, match="has no calibrated form to simulate"):
            calibrated.chosen(name)
    with pytest.raises(UsageError, match="there is no method 'nf5'"):
        calibrated.chosen("nf5-calibrated")
    able = {name for name in NAMED if calibrated.form_of(name)}
    assert able == {"llm-int8", "nf4-plain", "nf4", "fp4-plain", "fp4", "nf3", "rtn", "hqq", "fp8", "mxfp4", "nvfp4"}


@pytest.mark.parametrize("name", ["gpt2", "opt", "mixtral"])
def test_other_architectures_in_several_runs(name, tmp_path, monkeypatch):
    """Experts see a share of the tokens, gpt2's weights are transposed; a text in several runs is calibrated in each alike."""
    make_model(name, tmp_path, torch.float32)
    add_tokenizer(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(STORIES[:20]))
    options = {"text": text, "tokens": 400, "sequence_length": 64, "methods": "nf4,nf4-calibrated", "device": "cpu"}
    once = qcli.evaluate(str(tmp_path), **options)
    plain, form = (row for row in once.rows if row.name in ("nf4", "nf4-calibrated"))
    assert form.against.divergence.mean.value < 0.9 * plain.against.divergence.mean.value
    assert form.bytes == plain.bytes and form.weight_sqnr < plain.weight_sqnr
    monkeypatch.setattr("qcli.streaming.reading.HIDDEN_BYTES", 100_000)
    again = qcli.evaluate(str(tmp_path), **options)
    for ours, theirs in zip(once.rows, again.rows, strict=True):
        assert ours.quality.loss.value == pytest.approx(theirs.quality.loss.value, rel=1e-5)


def test_statistics_are_let_go_with_their_block(texts, monkeypatch):
    passed, counts = calibrated.CalibratedMethods.passed, []

    def counted(self, unit):
        before = len(self._found)
        passed(self, unit)
        counts.append((before, len(self._found)))

    monkeypatch.setattr(calibrated.CalibratedMethods, "passed", counted)
    qcli.evaluate(str(DEMO), methods="nf4-calibrated", text=texts[0], tokens=200, device="cpu")
    assert counts.count((7, 0)) == 6 and not any(after for _, after in counts)
