"""Calibrated runs from end to end: what they gain, what others load, and that nothing but the input decides their bytes."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal

import bitsandbytes
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qcli
from qcli.calibration import statistics
from qcli.errors import CheckpointError, NonFiniteError, PlanError, UsageError
from qcli.methods._gptq import factorized
from qcli.quantization import shard_files, staging
from qcli.quantization.quantize import make_plan
from qcli.runtime import cpu
from tests.conftest import ROOT
from tests.models import add_tokenizer, make_model

DEMO = ROOT / "examples" / "demo-model"
STORY = "Once upon a time there was a little dog. He liked to run in the park with his friend. One day he found a red ball. "


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of some 5,000 bytes that differ."""
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text("".join(f"{i} {STORY[i % 60 :]}" for i in range(60)))
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "model"
    make_model("llama", folder)
    add_tokenizer(folder)
    return folder


def digest(folder) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("options, most", [({"bits": 4}, 0.4), ({"bits": 4, "format": "gptq"}, 0.4), ({"bits": 3}, 0.5)])
def test_what_it_gains_on_the_demo_model(options, most, tmp_path, text):
    """KL divergence on held-out text, beside that of the same scheme without texts."""
    report = qcli.quantize(str(DEMO), tmp_path / "out", calibrate=True, text=text, **options)
    found = report.calibration
    assert found.checked.kl < most * found.checked.plain_kl
    assert not found.checked.is_worse and found.modules == 42 and found.held_out > 100
    assert {kind.name for kind in found.kinds} == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    assert all(kind.relative_error < kind.plain_relative_error for kind in found.kinds)
    stored = json.loads((tmp_path / "out" / "qcli.json").read_text())
    assert stored["calibration"]["tokens"] == found.tokens
    assert f"KL divergence from the original {found.checked.kl:.5f}" in (tmp_path / "out" / "README.md").read_text()


def test_modules_that_read_one_input_share_its_factor(tmp_path, text, monkeypatch):
    made = []
    monkeypatch.setattr(statistics, "factorized", lambda *given: made.append(given) or factorized(*given))
    qcli.quantize(str(DEMO), tmp_path / "out", bits=4, calibrate=True, text=text, tokens=1000, check=False)
    assert len(made) == 6 * 4  # q, k and v; o; gate and up; down


def test_the_check_is_what_evaluate_measures(tmp_path, text, monkeypatch):
    """The held-out windows by transformers alone, from the dequantized folder."""
    monkeypatch.setattr(cpu, "native_bfloat16", lambda: False)  # else it is computed in bfloat16
    report = qcli.quantize(str(DEMO), tmp_path / "out", bits=4, calibrate=True, text=text, settings={"sequence_length": "64"})
    from qcli.quantization.calibration_run import split
    from qcli.streaming.corpus import read_windows
    from qcli.streaming.skeleton import Skeleton

    skeleton = Skeleton(str(DEMO), dtype="float32")
    _, held_out = split(read_windows(skeleton.tokenizer, text, sequence_length=64).windows, True)
    assert sum(window.scored for window in held_out) == report.calibration.checked.tokens
    whole = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    rounded = AutoModelForCausalLM.from_pretrained(_dequantized(tmp_path), dtype=torch.float32)
    total = 0.0
    for window in held_out:
        ids = torch.tensor(window.ids)[None]
        with torch.inference_mode():
            p, q = (torch.log_softmax(m(ids).logits[0].double(), -1)[window.context - 1 : -1] for m in (whole, rounded))
        total += float((p.exp() * (p - q)).sum())
    assert report.calibration.checked.kl == pytest.approx(total / report.calibration.checked.tokens, rel=0.01)


def _dequantized(folder):
    qcli.dequantize(str(folder / "out"), folder / "plain", dtype="float32")
    return folder / "plain"


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "phi3", "gpt2", "opt", "bloom", "mixtral", "cohere", "gpt_neox"])
def test_architectures(name, tmp_path, text):
    """Every module is calibrated, and the folder is an ordinary checkpoint of bitsandbytes' format."""
    make_model(name, tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    report = qcli.quantize(str(tmp_path / "model"), tmp_path / "out", bits=4, calibrate=True, text=text, tokens=1500)
    assert report.calibration.modules == report.quantized_modules == sum(kind.modules for kind in report.calibration.kinds)
    known = ("no token reached", "not transformed")  # channels that a ReLU shuts; inputs that heads share
    assert all(any(each in note for each in known) for note in report.calibration.notes)
    assert all(kind.relative_error < kind.plain_relative_error for kind in report.calibration.kinds)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    ours = AutoModelForCausalLM.from_pretrained(_dequantized(tmp_path), dtype=torch.float32)
    compared = 0
    for path, module in theirs.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = ours.get_submodule(path).weight
            decoded = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            decoded = decoded.t() if name == "gpt2" else decoded  # whose modules hold weights transposed
            torch.testing.assert_close(decoded, weight, rtol=2**-7, atol=1e-6)
            compared += 1
    assert compared == report.quantized_modules


@pytest.mark.parametrize(
    "method, options, format",
    [
        ("nf4", {"settings": {"search": "imatrix"}}, None),
        ("fp4", {}, None),
        ("rtn", {"group_size": 32, "settings": {"zero_point": "true"}}, "compressed-tensors"),
        ("rtn", {"bits": 8, "group_size": -1}, "gptq"),
        ("hqq", {"group_size": 32}, "awq"),
        ("fp8", {}, None),
        ("mxfp4", {}, None),
        ("nvfp4", {}, None),
        ("nf3", {}, None),
        ("rtn", {"bits": 3, "group_size": 32}, "qcli"),
        ("nf4", {}, "qcli"),
        ("nf3", {"group_size": 256}, "qcli"),  # which does not divide rows
    ],
)
def test_every_scheme_that_holds_the_result(method, options, format, llama, tmp_path, text):
    found = qcli.quantize(
        str(llama), tmp_path / "out", method=method, format=format, calibrate=True, text=text, tokens=1500, **options
    ).calibration
    assert found.checked.kl < found.checked.plain_kl
    assert all(kind.relative_error < kind.plain_relative_error for kind in found.kinds)


def test_threads_do_not_matter(llama, tmp_path, text):
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            qcli.quantize(str(llama), tmp_path / f"out{threads}", bits=4, calibrate=True, text=text, tokens=2000)
    finally:
        torch.set_num_threads(before)
    assert digest(tmp_path / "out1") == digest(tmp_path / "out3")


def test_both_orders_gain(llama, tmp_path, text):
    """The first block is the same in both; what reaches the second differs."""
    from safetensors.torch import load_file

    found = []
    for order in ("sequential", "parallel"):
        settings = {"order": order}
        report = qcli.quantize(str(llama), tmp_path / order, bits=4, calibrate=True, text=text, tokens=2000, settings=settings)
        assert report.calibration.checked.kl < report.calibration.checked.plain_kl
        found.append(load_file(tmp_path / order / "model.safetensors"))
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    assert [torch.equal(found[0][name], found[1][name]) for name in names] == [True, False]


def killed(folder, text, after):
    """In a process of its own: calibrates, and kills itself once so many units are journalled."""
    os.chdir(folder)
    shard_files.SYNC_SECONDS = 0
    finish = staging.Staging.finish_work

    def finish_work(self, index, errors):
        finish(self, index, errors)
        if len(self.done) >= after:
            os.kill(os.getpid(), signal.SIGKILL)

    staging.Staging.finish_work = finish_work
    qcli.quantize("model", "out", bits=4, calibrate=True, text=text, tokens=2000)


@pytest.mark.parametrize("after", [pytest.param(3, marks=pytest.mark.slow), 7, pytest.param(11, marks=pytest.mark.slow), 15])
def test_kill_and_rerun(after, llama, tmp_path, text, monkeypatch):
    qcli.quantize(str(llama), tmp_path / "whole", bits=4, calibrate=True, text=text, tokens=2000)
    (tmp_path / "model").symlink_to(llama)
    process = multiprocessing.get_context("spawn").Process(target=killed, args=(tmp_path, text, after))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "out").exists()
    monkeypatch.chdir(tmp_path)
    lines = (tmp_path / "out.partial" / ".qcli" / "journal.jsonl").read_text().splitlines()
    plan = make_plan("model", "out", bits=4, calibrate=True, text=text, tokens=2000)
    done = {json.loads(line)["unit"] for line in lines} & {work.index for work in plan.calibrated}
    report = qcli.quantize("model", "out", bits=4, calibrate=True, text=text, tokens=2000)
    assert sum(kind.modules for kind in report.calibration.kinds) == 14 - len(done)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_another_text_is_another_run(llama, tmp_path, text, monkeypatch):
    monkeypatch.setattr(staging.Staging, "publish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        qcli.quantize(str(llama), tmp_path / "out", bits=4, calibrate=True, text=text, tokens=2000)
    monkeypatch.undo()
    with pytest.raises(PlanError, match="its calibration was"):
        qcli.quantize(str(llama), tmp_path / "out", bits=4, calibrate=True, text=text, tokens=1000)


def test_modules_that_few_tokens_reach_are_rounded_without_texts(llama, tmp_path, text, monkeypatch):
    """As experts may be. They are named, and have the bytes of the search without texts."""
    from qcli.quantization import calibrating

    add = calibrating.Gatherer._add

    def starved(self, number, seen):
        add(self, number, {name: xs for name, xs in seen.items() if "layers.1.mlp.down" not in name})

    monkeypatch.setattr(calibrating.Gatherer, "_add", starved)
    report = qcli.quantize(str(llama), tmp_path / "out", bits=4, calibrate=True, text=text, tokens=1500)
    note = next(note for note in report.calibration.notes if "not transformed" not in note)
    assert "too few tokens" in note and "model.layers.1.mlp.down_proj (0)" in note
    qcli.quantize(str(llama), tmp_path / "mse", bits=4, search="mse")
    from safetensors.torch import load_file

    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "mse"))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(ours[f"{name}.absmax"], theirs[f"{name}.absmax"])
    assert (ours[name] != theirs[name]).float().mean() < 0.01
    assert not torch.equal(ours["model.layers.0.mlp.down_proj.weight"], theirs["model.layers.0.mlp.down_proj.weight"])


def test_modules_that_see_a_part_of_the_tokens(llama, tmp_path, text, monkeypatch):
    """As experts do: how many is shown, and their statistics are of these alone."""
    from qcli.quantization import calibrating

    add = calibrating.Gatherer._add

    def routed(self, number, seen):
        add(self, number, {name: [x[:, ::3] for x in xs] if "down_proj" in name else xs for name, xs in seen.items()})

    monkeypatch.setattr(calibrating.Gatherer, "_add", routed)
    report = qcli.quantize(str(llama), tmp_path / "out", bits=4, calibrate=True, text=text, tokens=1500, check=False)
    note = next(note for note in report.calibration.notes if "reached by" in note)
    assert note.startswith("2 modules, as of experts, were reached by ") and all(400 < n < 600 for n in counts(note))


def counts(note):
    return [int(word) for word in note.replace(",", "").split() if word.isdigit() and int(word) > 2]


BAD_TEXTS = {
    "empty": ("txt", b"", "holds 0 tokens, too little"),
    "one token": ("txt", b"x", "holds 1 token, too little"),
    "no known encoding": ("txt", b"\xff\xfe\xfa", "not UTF-8"),
    "a line in no known encoding": ("jsonl", b'{"text": "a b c"}\n{"text": "\xff"}\n', "line 2 is not UTF-8"),
    "a broken line": ("jsonl", b'{"text": "a b c"}\n{"text": "d\n', "line 2 is not valid JSON"),
    "no document": ("jsonl", b'{"text": "a b c"}\n{"title": "d"}\n', "line 2 has no text"),
    "no template": ("jsonl", b'{"messages": [{"role": "user", "content": "Hello."}]}\n', "has no chat template"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_bad_texts(name, llama, tmp_path):
    suffix, content, message = BAD_TEXTS[name]
    path = tmp_path / f"bad.{suffix}"
    path.write_bytes(content)
    with pytest.raises((UsageError, CheckpointError), match=message):
        qcli.quantize(str(llama), tmp_path / "out", bits=4, calibrate=True, text=path)
    assert not (tmp_path / "out").exists()


def test_conversations_calibrate_through_the_template(llama, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(model)
    path = tmp_path / "chat.jsonl"
    line = json.dumps({"messages": [{"role": "user", "content": STORY}, {"role": "assistant", "content": STORY[30:]}]})
    path.write_text((line + "\n") * 10)
    report = qcli.quantize(str(model), tmp_path / "out", bits=4, calibrate=True, text=path)
    assert report.calibration.tokens > 1000 and report.calibration.checked.kl < report.calibration.checked.plain_kl


def test_the_same_token_over_and_over(llama, tmp_path):
    """A Hessian of rank one or so: the damping decides, and the result is no worse than plain rounding on that text."""
    path = tmp_path / "same.txt"
    path.write_text("a" * 2000)
    found = qcli.quantize(str(llama), tmp_path / "out", bits=4, calibrate=True, text=path).calibration
    assert found.checked.kl < found.checked.plain_kl


def test_activations_that_are_not_finite_are_named(tmp_path, text):
    model = make_model("llama", tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = torch.inf
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(NonFiniteError, match="model.layers.1"):
        qcli.quantize(str(tmp_path / "model"), tmp_path / "out", bits=4, calibrate=True, text=text, tokens=1000)


@pytest.mark.parametrize("kl, worse", [(0.09, False), (0.11, False), (0.13, True)])
def test_worse_is_more_than_two_standard_errors(kl, worse):
    from qcli.quantization.calibration_report import Checked

    assert Checked(100, 5.0, 5.1, kl, 0.02, 0.1, 0.02, 0.01).is_worse == worse


def test_what_texts_do_not_decide_is_refused(llama, tmp_path, text):
    plan = make_plan(str(llama), tmp_path / "out", method="zeropoint", calibrate=True)
    assert any("no text decides" in problem for problem in plan.problems)
    plan = make_plan(str(llama), tmp_path / "out", bits=4, text=text)
    assert any("no text decides how nf4 is rounded without --calibrate" in problem for problem in plan.problems)
    plan = make_plan(str(llama), tmp_path / "out", bits=4, calibrate=True, settings={"modules": "rules"})
    assert any("modules=rules" in problem for problem in plan.problems)
    with pytest.raises(UsageError, match="cannot read the text"):
        make_plan(str(llama), tmp_path / "out", bits=4, calibrate=True, text=tmp_path / "none.txt")


def test_a_plan_survives_json(llama, tmp_path, text):
    from qcli.quantization.plan_json import from_json, to_json

    plan = make_plan(str(llama), tmp_path / "out", bits=4, calibrate=True, text=text, tokens=1000)
    again = from_json(json.loads(json.dumps(to_json(plan))))
    assert again.calibration == plan.calibration and again.identity == plan.identity
    assert [w.method for w in again.work] == [w.method for w in plan.work]
