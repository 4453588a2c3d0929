"""SqueezeLLM from end to end: what gradients decide, what is stored, and that nothing but the input decides its bytes."""

import json
import multiprocessing
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qcli
from qcli.errors import NonFiniteError, UsageError
from qcli.methods import make
from qcli.quantization import by_gradients, shard_files, staging
from qcli.quantization.quantize import make_plan
from qcli.quantization.room import calibration_memory
from qcli.recipe import Choice, Recipe
from qcli.runtime import cpu
from qcli.schemes import NAMED
from qcli.streaming.corpus import read_windows
from qcli.streaming.skeleton import Skeleton
from tests.calibration.test_fisher import whole
from tests.conftest import ROOT
from tests.models import add_tokenizer, make_model, make_tied
from tests.quantization.test_calibrated import STORY, digest

DEMO = ROOT / "examples" / "demo-model"
SQUEEZE = {"method": "squeezellm", "tokens": 1500}


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


@pytest.mark.parametrize("bits, most", [(4, 0.8), (3, 0.8)])
def test_what_it_gains_on_the_demo_model(bits, most, tmp_path, text):
    """KL divergence on held-out text, beside that of k-means with as many weights kept. It runs, and scores what was held out."""
    report = qcli.quantize(str(DEMO), tmp_path / "out", method="squeezellm", bits=bits, text=text)
    checked = report.calibration.checked
    assert checked.kl < most * checked.plain_kl and not checked.is_worse
    assert report.calibration.modules == report.quantized_modules == 42
    assert report.calibration.seconds["gradients"] > 0
    scored = qcli.evaluate(str(tmp_path / "out"), against=str(DEMO), text=text, tokens=400, dtype="float32")
    plain = qcli.quantize(str(DEMO), tmp_path / "kmeans", method="kmeans", settings={"bits": bits, "sparse": 0.005})
    assert plain.quantized_modules == 42
    theirs = qcli.evaluate(str(tmp_path / "kmeans"), against=str(DEMO), text=text, tokens=400, dtype="float32")
    kl = [found.rows[-1].against.divergence.mean.value for found in (scored, theirs)]
    assert kl[0] < most * kl[1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3_text", "tied"])
def test_what_is_stored_follows_from_autograds_squares(name, tmp_path, text, monkeypatch):
    """Of the whole model by transformers alone: the same weights beside the codes, and tables as good under the same squares."""
    monkeypatch.setattr(cpu, "native_bfloat16", lambda: False)
    make_tied("llama", tmp_path / "model") if name == "tied" else make_model(name, tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    report = qcli.quantize(
        str(tmp_path / "model"), tmp_path / "out", text=text, check=False, settings={"sensitive": "0.02"}, **SQUEEZE
    )
    assert report.calibration.notes == []
    windows = read_windows(Skeleton(str(tmp_path / "model")).tokenizer, text, tokens=1500, sequence_length=64).windows
    fisher, _ = whole(tmp_path / "model", windows)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    qcli.dequantize(str(tmp_path / "out"), tmp_path / "plain", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    decoded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    method = make(NAMED["squeezellm"], {"sensitive": 0.02})
    for module in fisher:
        weight, values = (m.get_submodule(module).weight.detach() for m in (model, decoded))
        weight, values = (w.t().contiguous() if name == "gpt2" else w for w in (weight, values))
        encoder = method.encoder_by(fisher[module].contiguous())
        codes = encoder.feed(weight.bfloat16().flatten(), 0)["codes"]
        parts = encoder.finish()[0] | {"codes": codes}
        ours = next(stored[n] for n in stored if module in n and n.endswith("sparse_columns"))
        assert (ours == parts["sparse_columns"]).float().mean() > 0.97, module  # but for what is nearly alike
        errors = [(fisher[module] * (weight - w).square()).sum().item() for w in (values, method.decode(parts, *weight.shape))]
        assert errors[0] == pytest.approx(errors[1], rel=0.03), module


def test_it_loads_and_runs_as_what_it_decodes_to(llama, tmp_path, text):
    qcli.quantize(str(llama), tmp_path / "out", text=text, settings={"outliers": "0.05"}, **SQUEEZE)
    qcli.dequantize(str(tmp_path / "out"), tmp_path / "plain", dtype="float32")
    ids = torch.arange(1, 30)[None]
    model, _ = qcli.load(str(tmp_path / "out"), dtype="float32", device="cpu")
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)(ids).logits
        torch.testing.assert_close(model(ids).logits, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (scheme,) = config["schemes"]
    assert (scheme["name"], scheme["bits"], scheme["sparse"]) == ("squeezellm", 4, 0.0505)


def test_threads_do_not_matter(llama, tmp_path, text):
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            qcli.quantize(str(llama), tmp_path / f"out{threads}", text=text, **SQUEEZE)
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
    qcli.quantize("model", "out", text=text, **SQUEEZE)


@pytest.mark.parametrize("after", [3, 11])
def test_kill_and_rerun(after, llama, tmp_path, text, monkeypatch):
    """The last block is rounded first, and is not rounded again."""
    qcli.quantize(str(llama), tmp_path / "whole", text=text, **SQUEEZE)
    (tmp_path / "model").symlink_to(llama)
    process = multiprocessing.get_context("spawn").Process(target=killed, args=(tmp_path, text, after))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "out").exists()
    monkeypatch.chdir(tmp_path)
    lines = (tmp_path / "out.partial" / ".qcli" / "journal.jsonl").read_text().splitlines()
    plan = make_plan("model", "out", text=text, **SQUEEZE)
    done = {plan.work[json.loads(line)["unit"]].linear.module for line in lines}
    assert len(done) == after and sum(".layers.1." in name for name in done) == min(after, 7)
    rounded = []
    one = by_gradients.round_by_fisher
    monkeypatch.setattr(by_gradients, "round_by_fisher", lambda *a: (rounded.append(a[2].linear.module), one(*a))[1])
    qcli.quantize("model", "out", text=text, **SQUEEZE)
    assert len(rounded) == 14 - after and done.isdisjoint(rounded)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_beside_other_methods_it_has_the_same_bytes(llama, tmp_path, text):
    """Its gradients are those of the model as it was, whatever other modules become. The others see it as it was rounded."""
    rules = (("*.q_proj", Choice("squeezellm")), ("*.up_proj", Choice("squeezellm")))
    recipe = Recipe(Choice("nf4"), rules)
    alone = qcli.quantize(str(llama), tmp_path / "alone", text=text, **SQUEEZE)
    mixed = qcli.quantize(str(llama), tmp_path / "mixed", recipe=recipe, calibrate=True, text=text, tokens=1500)
    assert alone.calibration.tokens == mixed.calibration.tokens
    assert mixed.calibration.checked.kl < mixed.calibration.checked.plain_kl
    assert {kind.name for kind in mixed.calibration.kinds} == {"k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"}
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("mixed", "alone"))
    same = [name for name in theirs if "q_proj" in name or "up_proj" in name]
    assert len(same) == 16 and all(torch.equal(ours[name], theirs[name]) for name in same)


def test_kmeans_with_texts_is_squeezellm(llama, tmp_path, text):
    settings = {"sparse": "0.02", "bits": "3"}
    plan = make_plan(str(llama), tmp_path / "out", method="kmeans", calibrate=True, text=text, settings=settings)
    (method,) = {work.method for work in plan.quantized}
    assert method == make(NAMED["squeezellm"], {"bits": 3, "outliers": 0.02, "sensitive": 0.0})


def test_modules_that_few_tokens_reach_are_rounded_without_texts(llama, tmp_path, text, monkeypatch):
    """As experts may be. They are named, and have the bytes of k-means without texts."""
    add = by_gradients.FisherGatherer._add

    def starved(self, number, seen):
        add(self, number, {name: met for name, met in seen.items() if "layers.1.mlp.down" not in name})

    monkeypatch.setattr(by_gradients.FisherGatherer, "_add", starved)
    report = qcli.quantize(str(llama), tmp_path / "out", text=text, **SQUEEZE)
    (note,) = report.calibration.notes
    assert "too few tokens" in note and "model.layers.1.mlp.down_proj (0)" in note
    qcli.quantize(str(llama), tmp_path / "kmeans", method="kmeans", settings={"sparse": "0.005"})
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "kmeans"))
    same = {name: torch.equal(ours[name], theirs[name]) for name in ours if name.endswith("down_proj.weight")}
    assert same == {"model.layers.0.mlp.down_proj.weight": False, "model.layers.1.mlp.down_proj.weight": True}


def test_its_memory_is_planned(llama, tmp_path, text):
    """For two blocks three hidden states of a token wait, and three more are in memory."""
    needed = [
        calibration_memory(make_plan(str(llama), tmp_path / "out", method="squeezellm", text=text, tokens=n)) for n in (1000, 2000)
    ]
    assert needed[1] - needed[0] == 1000 * 4 * 64 * (3 + 3)
    plan = make_plan(str(llama), tmp_path / "out", method="squeezellm", text=text, check=False)
    assert plan.problems == [] and plan.calibration is not None and not plan.calibration.check


@pytest.mark.parametrize("content, message", [("", "too little"), (b"\xff\xfe\xfa", "not UTF-8")])
def test_bad_texts(content, message, llama, tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message):
        qcli.quantize(str(llama), tmp_path / "out", method="squeezellm", text=path)
    with pytest.raises(UsageError, match="cannot read the text"):
        make_plan(str(llama), tmp_path / "out", method="squeezellm", text=tmp_path / "none.txt")
    assert not (tmp_path / "out").exists()


def test_what_is_not_finite_is_named(tmp_path, text):
    model = make_model("llama", tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = torch.inf
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        qcli.quantize(str(tmp_path / "model"), tmp_path / "out", text=text, **SQUEEZE)


def test_no_texts_are_read_while_a_model_is_loaded(llama):
    with pytest.raises(UsageError, match="its tables follow from gradients"):
        qcli.load(str(llama), method="squeezellm")
