"""LLM.int8() with columns that a report of inspect-outliers names: which they are, what others read, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qcli
from qcli.calibration.reported_columns import ReportedColumns
from qcli.errors import UsageError
from qcli.methods.choosing import recipe_in_force
from qcli.quantization.plan_json import from_json, to_json
from qcli.quantization.quantize import make_plan, run_plan
from tests.conftest import run_cli
from tests.quantization.test_calibrated import DEMO, digest, text  # noqa: F401
from tests.quantization.test_outlier_columns import definition, llama  # noqa: F401

DOWN = "model.layers.0.mlp.down_proj"
SHARE = {"outlier_share": "0.25"}


@pytest.fixture(scope="module")
def report(llama, text, tmp_path_factory):  # noqa: F811
    """Of the model with outliers in dims 2, 17 and 40 of the hidden state, as the command writes it."""
    found = qcli.inspect_outliers(str(llama), text=text, tokens=1000, threshold=4.0).summary()
    path = tmp_path_factory.mktemp("report") / "report.json"
    path.write_text(json.dumps(found))
    return path


@pytest.fixture(scope="module")
def made(llama, report, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("made")
    found = qcli.quantize(str(llama), folder / "out", bits=8, settings={"outliers": str(report), **SHARE})
    qcli.quantize(str(llama), folder / "plain", bits=8)
    return folder, found


def columns_of(folder):
    tensors = load_file(folder / "outliers.safetensors")
    return {name.removesuffix(".outlier_columns"): each.tolist() for name, each in tensors.items() if name.endswith("columns")}


def filled(dims, most):
    """The first `most` of dims and as many of the smallest other numbers as make a multiple of eight."""
    kept = list(dims[:most])
    while len(kept) % 8:
        kept.append(min(set(range(1000)) - set(kept)))
    return sorted(kept)


def test_columns_are_those_that_the_report_names(made, report):
    stored, found = columns_of(made[0] / "out"), json.loads(report.read_text())
    of_hidden_state = [feature["dim"] for feature in found["features"]]
    assert set(of_hidden_state[:3]) == {2, 17, 40}
    expected = {}
    for layer in found["layers"]:
        for site in layer["sites"]:
            hidden = site["kind"] in ("attention input", "ffn input")
            dims = of_hidden_state if hidden else [dim["dim"] for dim in site["dims"]]
            for module in site["modules"] if dims else ():
                expected[f"{layer['name']}.{module}"] = filled(dims, site["channels"] // 4 // 8 * 8)
    assert stored == expected and DOWN in stored
    assert len(stored[DOWN]) == 16 and stored["model.layers.0.mlp.gate_proj"] == stored["model.layers.1.self_attn.q_proj"]


def test_what_is_stored(made, llama):  # noqa: F811
    out, plain, source = made[0] / "out", load_file(made[0] / "plain" / "model.safetensors"), load_file(llama / "model.safetensors")
    stored = load_file(out / "model-00001-of-00001.safetensors")
    assert stored.keys() == plain.keys() and all(torch.equal(stored[name], plain[name]) for name in plain)
    beside = load_file(out / "outliers.safetensors")
    squares = {}
    for module, columns in columns_of(out).items():
        weight = source[f"{module}.weight"]
        assert torch.equal(beside[f"{module}.outlier_weight"], weight[:, columns].to(torch.bfloat16))
        values = stored[f"{module}.weight"].double() * stored[f"{module}.SCB"].double()[:, None] / 127
        values[:, columns] = beside[f"{module}.outlier_weight"].double()
        error, norm = (values - weight.double()).square().sum(), weight.double().square().sum()
        squares.setdefault(module.rsplit(".", 1)[1], []).append((float(error), float(norm)))
    for kind in made[1].kinds:
        if kind.name in squares:
            error, norm = map(sum, zip(*squares[kind.name]))
            assert kind.errors.squared_error == pytest.approx(error, rel=1e-4)
            assert kind.errors.squared_norm == pytest.approx(norm, rel=1e-6)
    stated = json.loads((out / "qcli.json").read_text())
    assert stated["options"]["outliers"] == "report.json" and str(made[0]) not in json.dumps(stated)


def test_transformers_and_bitsandbytes_load_it_as_llm_int8(made):
    models = [AutoModelForCausalLM.from_pretrained(made[0] / name) for name in ("out", "plain")]
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(models[0](ids).logits, models[1](ids).logits)


def test_qcli_runs_it_with_fixed_columns(made, llama, text):  # noqa: F811
    model, _ = qcli.load(str(made[0] / "out"), dtype="float32", device="cpu")
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 20
    module = model.get_submodule(DOWN)
    assert module.outlier_columns.tolist() == columns_of(made[0] / "out")[DOWN]
    expected = definition(module, x)
    assert np.abs(module(x).double().numpy() - expected).max() <= 1e-5 * np.abs(expected).max()
    ours, plain = (
        qcli.evaluate(str(made[0] / name), against=str(llama), text=text, tokens=1000, dtype="float32", device="cpu").rows[1]
        for name in ("out", "plain")
    )
    assert ours.against.divergence.mean.value < 0.7 * plain.against.divergence.mean.value


def test_neither_threads_nor_a_journey_through_json_matter(made, llama, report, tmp_path):  # noqa: F811
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        plan = make_plan(str(llama), tmp_path / "out", bits=8, settings={"outliers": str(report), **SHARE})
        run_plan(from_json(json.loads(json.dumps(to_json(plan)))))
    finally:
        torch.set_num_threads(before)
    assert digest(tmp_path / "out") == digest(made[0] / "out")


def test_a_run_that_stopped_goes_on_with_the_same_columns_alone(llama, report, tmp_path):  # noqa: F811
    def planned(path):
        return make_plan(str(llama), tmp_path / "out", bits=8, settings={"outliers": str(path), **SHARE})

    copy = tmp_path / "other" / report.name
    copy.parent.mkdir()
    found = json.loads(report.read_text())
    copy.write_text(json.dumps(found))
    assert planned(copy).identity == planned(report).identity and not planned(report).is_mixed
    found["features"] = [{"dim": 5}]
    copy.write_text(json.dumps(found))
    assert planned(copy).identity != planned(report).identity


def test_a_recipe_may_name_it(llama, report, tmp_path):  # noqa: F811
    recipe, _ = recipe_in_force(None, 8, None, {}, settings={"outliers": str(report), **SHARE}, skip=["model.layers.1"])
    plan = make_plan(str(llama), tmp_path / "out", recipe=recipe)
    assert not plan.problems and {w.info.name.split(".")[2] for w in plan.work if w.columns} == {"0"}


def edited(report, folder, edit):
    found = json.loads(report.read_text())
    edit(found)
    path = folder / "edited.json"
    path.write_text(json.dumps(found))
    return path


def without_dims(found):
    found["features"] = []
    for layer in found["layers"]:
        for site in layer["sites"]:
            site["dims"] = []


def test_modules_without_outliers_have_no_columns(llama, report, tmp_path):  # noqa: F811
    path = edited(report, tmp_path, lambda found: found["layers"][0]["sites"][-1].update(dims=[]))
    plan = make_plan(str(llama), tmp_path / "out", bits=8, head=8, settings={"outliers": str(path), **SHARE})
    columns = {w.linear.module: w.columns for w in plan.quantized}
    assert not plan.problems and columns[DOWN] == () and columns["model.layers.1.mlp.down_proj"] and columns["lm_head"] == ()
    assert any("does not name them" in note and "lm_head" in note for note in plan.notes)
    names = {output.name for work in plan.work for output in work.outputs}
    assert f"{DOWN}.SCB" in names and f"{DOWN}.outlier_columns" not in names
    narrow = make_plan(str(llama), tmp_path / "out", bits=8, settings={"outliers": str(path), "outlier_share": "0.07"})
    assert any("fewer than 8 of theirs" in note and "gate_proj" in note for note in narrow.notes) and not narrow.problems


OTHERS = {
    "architecture": (lambda r: r["model"].update(architecture="OPTForCausalLM"), "is OPTForCausalLM, expected LlamaForCausalLM"),
    "width": (lambda r: r["layers"][0]["sites"][0].update(channels=96), "self_attn.q_proj reads 96 channels, expected 64"),
    "fewer layers": (lambda r: r["layers"].pop(), "no input of model.layers.1.self_attn.q_proj, expected one of 64 channels"),
    "more layers": (lambda r: r["layers"].append(r["layers"][0] | {"name": "model.layers.2"}), "the block model.layers.2"),
    "names": (lambda r: [each["sites"].clear() for each in r["layers"]], "names none of the modules"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_report_of_another_model_is_refused(name, llama, report, tmp_path):  # noqa: F811
    edit, message = OTHERS[name]
    path = edited(report, tmp_path, edit)
    plan = make_plan(str(llama), tmp_path / "out", bits=8, settings={"outliers": str(path), **SHARE})
    (problem,) = plan.problems
    assert f"{path} is of another model, model: " in problem and message in problem


def test_the_report_of_another_model_is_refused(report, tmp_path):
    plan = make_plan(str(DEMO), tmp_path / "out", bits=8, settings={"outliers": str(report), **SHARE})
    assert any(f"{report} is of another model" in problem for problem in plan.problems)


def test_what_cannot_be(llama, report, text, tmp_path):  # noqa: F811
    def problems(path=report, **options):
        settings = {"outliers": str(path), **options.pop("settings", SHARE)}
        return make_plan(str(llama), tmp_path / "out", bits=8, settings=settings, **options).problems

    assert problems(calibrate=True, text=text) == [
        "--calibrate and outliers both choose the columns that stay in 16 bits; leave out one of the two"
    ]
    bare = edited(report, tmp_path, without_dims)
    none = f"{bare} names no outlier dim of any module: no value reached 4; leave out outliers={bare}"
    assert problems(bare) == [none]
    assert "the outlier_share is fewer than 8 columns in every module" in problems(settings={"outlier_share": "0.01"})[0]
    with pytest.raises(UsageError, match="outliers: the columns that a report names"):
        qcli.load(str(llama), bits=8, settings={"outliers": str(report)})
    with pytest.raises(UsageError, match="has no setting 'outliers'"):
        make_plan(str(llama), tmp_path / "out", bits=4, settings={"outliers": str(report)})


DAMAGED = {
    "another format": (lambda r: r.update(format="qcli-weights"), "its format is 'qcli-weights', expected 'qcli-outliers'"),
    "no model": (lambda r: r.pop("model"), "has no model, expected an object"),
    "no layers": (lambda r: r.pop("layers"), "has no layers, expected a list of objects"),
    "a dim outside": (lambda r: r["features"].append({"dim": 64}), "features: dim 64 is named, expected 0 to 63"),
    "a dim below": (lambda r: r["features"].append({"dim": -1}), "dim is -1"),
    "a dim of a site outside": (lambda r: r["layers"][0]["sites"][-1].update(dims=[{"dim": 128}]), "named, expected 0 to 127"),
    "no channels": (lambda r: r["layers"][1]["sites"][0].pop("channels"), "a site of model.layers.1 has no channels"),
    "a module that is a number": (lambda r: r["layers"][0]["sites"][0].update(modules=[1]), "modules is"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_reports(name, report, tmp_path):
    edit, message = DAMAGED[name]
    with pytest.raises(UsageError, match=message):
        ReportedColumns(str(edited(report, tmp_path, edit)))


def test_experts_are_named_together(tmp_path, report):
    def edit(found):
        found["layers"][0]["sites"].append({"kind": "other", "modules": ["mlp.experts.*.w1"], "channels": 64, "dims": [{"dim": 9}]})

    found = ReportedColumns(str(edited(report, tmp_path, edit)))
    assert found.of("model.layers.0.mlp.experts.11.w1").dims == (9,)
    assert found.of("model.layers.1.mlp.experts.11.w1") is None and found.of("lm_head") is None


def test_commands(llama, report, tmp_path):  # noqa: F811
    shutil.copy(report, tmp_path / "report.json")
    share = ("--set", "outlier_share=0.25")
    done = run_cli("quantize", str(llama), "--bits", "8", "--set", "outliers=report.json", *share, "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run_cli("methods", "llm-int8", cwd=tmp_path)
    assert "outliers" in done.stdout and done.returncode == 0
    done = run_cli("quantize", str(llama), "--bits", "8", "--set", "outliers=none.json", "-o", "out", cwd=tmp_path)
    assert done.returncode and "cannot read the report none.json" in done.stderr
