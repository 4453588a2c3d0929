"""`inspect-outliers --cluster`: the report of one machine's run, bit by bit."""

import json

import pytest
import torch
import transformers

from qcli.errors import NonFiniteError
from qcli.outliers.damage import Sample
from qcli.outliers.inspect_outliers import inspect_outliers
from qcli.streaming.corpus import read_windows
from qcli.streaming.dividing import divided
from tests.conftest import ROOT
from tests.models import add_tokenizer, make_model
from tests.outliers.planted import save, small_llama, write_text

MODEL, STORIES = str(ROOT / "examples" / "demo-model"), ROOT / "examples" / "stories.jsonl"


@pytest.fixture(autouse=True)
def one_thread():
    """As many as a worker has: a product may differ in its last bits with their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def report(model, **options) -> str:
    return json.dumps(inspect_outliers(str(model), device="cpu", **options).summary(), indent=1)


def test_the_report_of_one_machine(ray_cluster, tmp_path):
    """Stories, each second one cut: the short ones are a call of their own, and sampled windows lie on both machines."""
    stories = [json.loads(line)["text"] for line in STORIES.read_text().splitlines()[:26]]
    cut = [text[:160] if i % 2 else text for i, text in enumerate(stories)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in cut))
    windows = read_windows(transformers.AutoTokenizer.from_pretrained(MODEL), tmp_path / "text.jsonl").windows
    sampled = Sample.of(windows, 1).windows
    assert all(sampled & set(part) and set(part) - sampled for part in divided(windows, [1, 1]))
    found = report(MODEL, text=tmp_path / "text.jsonl", cluster=ray_cluster.address)
    assert found == report(MODEL, text=tmp_path / "text.jsonl")


@pytest.mark.slow
def test_an_ablation_by_three_workers(ray_cluster):
    options = {"text": STORIES, "tokens": 6000, "ablate": True}
    found = report(MODEL, **options, cluster=ray_cluster.address, workers=3)
    assert found == report(MODEL, **options)
    assert json.loads(found)["ablation"]["top1"] and json.loads(found)["attention"]["sink_share"] >= 0


@pytest.mark.slow
def test_massive_activations_and_bos(ray_cluster, tmp_path):
    """Each window has its massive activations, and each worker a spike of its own. What begins a window is counted apart."""
    from tokenizers.processors import TemplateProcessing

    model = small_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[9, 17] = 3000.0
    save(model, tmp_path)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    fast._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 254)])
    fast.save_pretrained(tmp_path)
    options = {"text": write_text(tmp_path / "text.txt", 5000), "sequence_length": 64, "ablate": True}
    found = report(tmp_path, **options, cluster=ray_cluster.address)
    assert found == report(tmp_path, **options)
    massive, bos = json.loads(found)["massive_activations"], json.loads(found)["bos"]
    assert massive[0]["sequences"] > 1 and json.loads(found)["super_weights"] and bos["positions"] == 80


@pytest.mark.slow
def test_experts(ray_cluster, tmp_path):
    make_model("mixtral", tmp_path)
    add_tokenizer(tmp_path)
    options = {"text": write_text(tmp_path / "text.txt", 5000), "sequence_length": 64}
    assert report(tmp_path, **options, cluster=ray_cluster.address) == report(tmp_path, **options)


@pytest.mark.slow
def test_what_a_worker_refuses(ray_cluster, tmp_path):
    model = small_llama()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[11, 0] = torch.nan
    save(model, tmp_path)
    options = {"text": write_text(tmp_path / "text.txt", 5000), "sequence_length": 64, "cluster": ray_cluster.address}
    with pytest.raises(NonFiniteError, match="input of model.layers.2.mlp.down_proj holds NaN or infinity in 1 of 96"):
        report(tmp_path, **options)


def test_no_texts_no_cluster(quick_cli):
    done = quick_cli("inspect-outliers", MODEL, "--weights-only", "--cluster", "local")
    assert done.returncode == 2 and "--cluster was given with --weights-only" in done.stderr and not done.stdout
    done = quick_cli("inspect-outliers", MODEL, "--workers", "2")
    assert done.returncode == 2 and "--workers was given without --cluster" in done.stderr
