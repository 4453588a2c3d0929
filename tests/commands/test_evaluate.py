"""`qcli evaluate` on the command line: its tables, JSON and CSV, and what it says of bad input."""

import csv
import json

import pytest
import torch
import transformers

from tests.adapters import make_adapter
from tests.conftest import ROOT
from tests.models import add_tokenizer, make_model

DEMO = ROOT / "examples/demo-model"
STORIES = ROOT / "examples/stories.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import qcli

    folder = tmp_path_factory.mktemp("evaluate")
    qcli.quantize(str(DEMO), folder / "nf4", device="cpu")
    return folder


def run(quick_cli, *arguments):
    done = quick_cli("evaluate", *arguments, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return done


def test_a_model_alone(quick_cli, tmp_path):
    arguments = (DEMO, "--text", STORIES, "--tokens", 300)
    text = run(quick_cli, *arguments, "--csv", "out.csv").stdout
    found = json.loads(run(quick_cli, *arguments, "--json").stdout)
    assert found["model"] == str(DEMO) and found["protocol"]["tokens"] == found["protocol"]["scored"] == 300
    [row] = found["rows"]
    assert f"{row['quality']['perplexity']['value']:.2f}" in text and "2.74 MB" in text and "16.000" in text
    for part in (
        "bits/byte",
        "stories.jsonl: 3 documents, 300 tokens",
        "stride 512 (no overlap)",
        "begins with BOS",
        "bfloat16 on cpu",
    ):
        assert part in text
    [line] = csv.DictReader((tmp_path / "out.csv").open())
    assert float(line["quality.perplexity.value"]) == row["quality"]["perplexity"]["value"]
    assert line["model"] == str(DEMO) and line["scored_bytes"] == str(found["protocol"]["scored_bytes"])
    assert not list(tmp_path.glob("*.partial"))


def test_the_bundled_text_is_the_default(quick_cli):
    text = run(quick_cli, DEMO, "--tokens", 200, "--sequence-length", 64, "--stride", 48).stdout
    assert "bundled text: 1 document, 200 tokens, of which 200 are scored" in text
    assert "4 windows of up to 64 tokens, stride 48 (the first 16 of a later window are context only)" in text


def test_a_model_against_its_base(folder, quick_cli, tmp_path):
    text = run(quick_cli, folder / "nf4", "--against", DEMO, "--text", STORIES, "--tokens", 300, "--csv", "out.csv").stdout
    for part in (
        f"against {DEMO}",
        "KL divergence (nats), 99.9%",
        "same likeliest token",
        "ratio of perplexities",
        "probability, RMS",
        "±",
    ):
        assert part in text
    base, model = csv.DictReader((tmp_path / "out.csv").open())
    assert base["name"] == str(DEMO) and base["against.loss_change.value"] == ""
    change = float(model["quality.loss.value"]) - float(base["quality.loss.value"])
    assert float(model["against.loss_change.value"]) == pytest.approx(change)


def test_methods_and_speed(quick_cli):
    arguments = (DEMO, "--methods", "int8,NF4", "--text", STORIES, "--tokens", 200)
    text = run(quick_cli, *arguments, "--speed").stdout
    for part in ("int8", "nf4", "SQNR", "ordinary activations", "exact", "decode", "peak memory", "float32 on cpu"):
        assert part in text
    found = json.loads(run(quick_cli, *arguments, "--json").stdout)
    assert [row["name"] for row in found["rows"]] == ["unquantized", "int8", "nf4"] and found["simulated"]


@pytest.fixture
def refused(quick_cli, tmp_path):
    def run(*arguments, message, code=2):
        done = quick_cli("evaluate", *arguments)
        assert done.returncode == code and message in done.stderr and not done.stdout
        assert not list(tmp_path.glob("*.csv*"))

    return run


def test_bad_options(folder, refused, tmp_path):
    refused(folder / "nf4", "--methods", "all", message="is quantized already")
    refused(DEMO, "--methods", "nf5", message="no method 'nf5'; nearest: nf4")
    refused(DEMO, "--methods", "all", "--against", DEMO, message="--against and --methods were both given")
    refused(DEMO, "--sequence-length", 1000, message="the model's context holds 512 tokens")
    refused(DEMO, "--sequence-length", 100, "--stride", 101, message="--stride is 101")
    refused(DEMO, "--tokens", 10**7, message="--tokens asks for 10,000,000")
    refused(DEMO, "--csv", tmp_path / "no/out.csv", message="there is no folder", code=1)
    refused(DEMO, "--csv", tmp_path, message="is a folder, not a file", code=1)
    refused(DEMO, "--text", tmp_path / "none.txt", message="cannot read the text")


def test_text_that_is_too_short(refused, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("Once")
    refused(DEMO, "--text", tmp_path / "empty.txt", message="empty.txt holds 0 tokens")
    refused(DEMO, "--text", tmp_path / "short.txt", message="short.txt holds 1 token")


def test_what_no_method_rounds_is_in_a_note(quick_cli, tmp_path):
    make_model("mixtral", tmp_path)
    add_tokenizer(tmp_path)
    text = run(quick_cli, tmp_path, "--methods", "nf4", "--tokens", 60).stdout
    assert "196,608 parameters of fused experts are no linear layers" in text  # 2 layers of 4 experts, three 64 x 128 each


def test_models_that_predict_no_text(refused, tmp_path):
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    add_tokenizer(tmp_path / "bert")
    refused(tmp_path / "bert", message="expected a causal language model")
    make_model("llama", tmp_path / "llama")
    refused(tmp_path / "llama", message="has no tokenizer", code=1)


def test_an_interrupted_run_leaves_no_file(quick_cli, tmp_path, monkeypatch):
    from qcli.evaluation import models

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "score_all", interrupt)
    done = quick_cli("evaluate", DEMO, "--text", STORIES, "--tokens", 100, "--csv", "out.csv")
    assert done.returncode == 130 and "interrupted" in done.stderr and not done.stdout
    assert not list(tmp_path.glob("out*"))


def test_an_adapter_is_compared_with_its_base(quick_cli, tmp_path):
    """On the streamed model; the loss is PEFT's."""
    base = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    theirs = make_adapter(base, tmp_path / "adapter")
    arguments = (DEMO, "--adapter", "adapter", "--against", DEMO, "--text", STORIES, "--tokens", 300, "--sequence-length", 300)
    found = json.loads(run(quick_cli, *arguments, "--dtype", "float32", "--json").stdout)
    of_base, row = found["rows"]
    assert of_base["name"] == str(DEMO) and row["name"] == f"{DEMO}, adapter adapter"
    assert row["bytes"] == of_base["bytes"] + sum(p.nbytes for n, p in theirs.named_parameters() if "lora_" in n)
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    documents = [json.loads(line)["text"] for line in STORIES.read_text().splitlines()[:3]]
    losses = []
    with torch.no_grad():
        for text in documents:
            ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
            logp = theirs(ids).logits[0, :-1].log_softmax(-1)
            losses.append(-logp.gather(1, ids[0, 1:, None])[:, 0])
    expected = torch.cat(losses)[:300].mean().item()
    assert row["quality"]["loss"]["value"] == pytest.approx(expected, rel=1e-5)
    assert row["against"]["loss_change"]["value"] == pytest.approx(expected - of_base["quality"]["loss"]["value"], rel=1e-4)
    assert row["against"]["divergence"]["mean"]["value"] > 0.1
    cached = json.loads(run(quick_cli, *arguments[:3], "--kv-dtype", "8", *arguments[5:], "--json").stdout)["rows"]
    assert [each["name"] for each in cached] == [f"{DEMO}, adapter adapter", f"{DEMO}, adapter adapter, int8 cache"]
    assert cached[1]["against"]["divergence"]["mean"]["value"] < 0.1


def test_an_adapter_has_no_methods(quick_cli, tmp_path):
    done = quick_cli("evaluate", DEMO, "--adapter", "adapter", "--methods", "nf4")
    assert done.returncode == 2 and "--adapter and --methods were both given" in done.stderr
    done = quick_cli("evaluate", DEMO, "--adapter", DEMO)
    assert done.returncode == 1 and "has no adapter_config.json" in done.stderr
