"""The findings on weights alone, against float64 arithmetic on the loaded tensors, bitsandbytes, and what was planted."""

import json
import os
import subprocess
import sys

import bitsandbytes.functional as F
import numpy as np
import pytest
import torch
from bitsandbytes.utils import find_outlier_dims
from safetensors.torch import load_file, save_file

import qcli
from qcli.checkpoint.source import Source
from qcli.commands._weights_tables import show
from qcli.outliers.weights import inspect
from qcli.outliers.weights import statistics as weight_statistics
from qcli.outliers.weights.summary import rows
from qcli.quantization.quantize import make_plan
from tests.conftest import ROOT
from tests.hub_server import running_hub
from tests.models import ARCHITECTURES, make_model

DOWN = "model.layers.{}.mlp.down_proj.weight"


def inspect_weights(model, **options):
    return inspect.inspect_weights(model, **options).summary()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make_model("llama", folder)
    return folder


def tensors(folder):
    return load_file(folder / "model.safetensors")


def replant(folder, to, change):
    """A copy of a model whose tensors `change` has edited."""
    to.mkdir()
    (to / "config.json").write_text((folder / "config.json").read_text())
    found = tensors(folder)
    change(found)
    save_file(found, to / "model.safetensors", {"format": "pt"})
    return to


def linear(report, tensor):
    return next(x for x in report["linears"] if x["tensor"] == tensor)


def oracle(w):
    """The figures of a weight [out, in] in float64."""
    w = w.double().numpy()
    absmax, rms = np.abs(w).max(), np.sqrt((w**2).mean())
    centred = w - w.mean()
    row = np.abs(w).max(1)
    block = np.abs(w.reshape(-1, 64)).max(1)
    codes = np.round(w / row[:, None] * 127)
    error = ((w - codes * row[:, None] / 127) ** 2).sum()
    return {
        "absmax": absmax,
        "rms": rms,
        "crest": absmax / rms,
        "kurtosis": (centred**4).mean() / (centred**2).mean() ** 2,
        "row_spread": row.max() / np.median(row),
        "row_crest": (row / np.sqrt((w**2).mean(1))).max(),
        "block_spread": block.max() / np.median(block),
    }, 10 * np.log10((w**2).sum() / error)


def nf4_sqnr(w):
    packed, state = F.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    error = w.double() - F.dequantize_4bit(packed, state).double()
    return 10 * float(torch.log10(w.double().square().sum() / error.square().sum()))


@pytest.mark.parametrize("name, dtype", [("llama", torch.bfloat16), ("gpt2", torch.float32), ("opt", torch.float16)])
def test_figures_equal_float64_arithmetic(name, dtype, tmp_path):
    make_model(name, tmp_path, dtype)
    stored = tensors(tmp_path)
    report = inspect_weights(str(tmp_path))
    assert len(report["linears"]) == {"llama": 15, "gpt2": 8, "opt": 12}[name]
    for found in report["linears"]:
        weight = stored[found["tensor"]]
        weight = weight.t().contiguous() if name == "gpt2" else weight  # stored as Conv1D has it
        assert [found["out_features"], found["in_features"]] == list(weight.shape)
        figures, int8 = oracle(weight)
        assert {key: found[key] for key in figures} == pytest.approx(figures, rel=1e-9), found["module"]
        assert found["sqnr"]["llm-int8"] == pytest.approx(int8, abs=0.02)
        # bitsandbytes decodes to the weight's own dtype, which rounds.
        assert found["sqnr"]["nf4"] == pytest.approx(nf4_sqnr(weight), abs=0.02)
        assert found["columns"]["beyond"] == len(find_outlier_dims(weight.float()))
        deviations = weight.double().std(0)
        z = float((deviations.max() - deviations.mean()) / deviations.std())
        assert found["columns"]["max_z"] == pytest.approx(z, rel=1e-9)
    for found in report["norms"]:
        gain = stored[found["tensor"]].double().numpy()
        assert [found["mean"], found["std"]] == pytest.approx([gain.mean(), gain.std()], rel=1e-12)
        assert found["max_z"] == pytest.approx(np.abs((gain - gain.mean()) / gain.std()).max(), rel=1e-12)
    norms = {n for n, t in stored.items() if t.dim() == 1 and n.endswith("weight")}
    assert {found["tensor"] for found in report["norms"]} == norms


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name, tmp_path):
    make_model(name, tmp_path)
    report = inspect_weights(str(tmp_path))
    json.dumps(report, allow_nan=False)
    assert sum(x["quantized"] for x in report["linears"]) == ARCHITECTURES[name][2]
    assert report["norms"] and all(x["sqnr"]["nf4"] > 15 for x in report["linears"])
    down = [x["module"] for x in report["linears"] if x["largest"] is not None]
    fused = name == "mixtral"  # whose experts are no linear modules
    assert len(down) == (0 if fused else 4 if name == "t5" else 2)
    assert any("fused experts" in note for note in report["notes"]) == fused


def test_planted_norm_gains_are_found_exactly(llama, tmp_path):
    dims = [3, 17, 40]

    def plant(found):
        for name, tensor in found.items():
            if "layernorm" in name:  # four norms of five: the last one stays
                tensor.fill_(1.0)
                tensor[dims] = torch.tensor([9.0, 8.0, -7.0], dtype=tensor.dtype)
        found["model.layers.0.input_layernorm.weight"][50] = 30.0

    report = inspect_weights(str(replant(llama, tmp_path / "planted", plant)))
    found = {d["dim"]: d for d in report["norm_dims"]}
    # The 30 hides the others in its norm.
    assert {d: (f["norms"], f["of"], f["candidate"]) for d, f in found.items()} == {
        3: (3, 5, True),
        17: (3, 5, True),
        40: (3, 5, True),
        50: (1, 5, False),
    }
    gain = np.ones(64)
    gain[dims] = 9.0, 8.0, -7.0
    z = np.abs(gain - gain.mean()) / gain.std()
    for dim in dims:
        assert found[dim]["max_z"] == pytest.approx(z[dim])


def test_planted_super_weights_are_found_exactly(llama, tmp_path):
    planted = {(5, 100): 4.0, (60, 7): -3.0}

    def plant(found):
        for place, value in planted.items():
            found[DOWN.format(1)][place] = value
        found["model.layers.0.mlp.up_proj.weight"][1, 1] = 9.0  # where none are looked for
        found[DOWN.format(0)][2, 2] = 0.2  # large, but not by far

    folder = replant(llama, tmp_path / "planted", plant)
    found = inspect_weights(str(folder))["super_weights"]
    assert {(w["row"], w["column"]): w["weight"] for w in found} == planted
    assert {w["module"] for w in found} == {"model.layers.1.mlp.down_proj"} and {w["layer"] for w in found} == {1}
    weight = tensors(folder)[DOWN.format(1)].double()
    next_largest = weight.abs().view(-1).sort(descending=True).values[2]
    assert found[0]["times_rms"] == pytest.approx(float(4 / weight.square().mean().sqrt()))
    assert found[1]["times_next"] == pytest.approx(float(3 / next_largest))
    assert inspect_weights(str(llama))["super_weights"] == []


def test_only_early_layers_are_searched_for_super_weights(tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, vocab_size=32
    )
    model = transformers.LlamaForCausalLM(config)
    for layer in (3, 4):
        model.model.layers[layer].mlp.down_proj.weight.data[0, 0] = 5.0
    model.save_pretrained(tmp_path)
    report = inspect_weights(str(tmp_path))
    assert [w["layer"] for w in report["super_weights"]] == [3]
    assert [x["layer"] for x in report["linears"] if x["largest"] is not None] == [0, 1, 2, 3]


def test_planted_columns_are_those_of_bitsandbytes(llama, tmp_path):
    def plant(found):
        for layer in (0, 1):
            found[f"model.layers.{layer}.self_attn.q_proj.weight"][:, [9, 33]] *= 30

    folder = replant(llama, tmp_path / "planted", plant)
    report = inspect_weights(str(folder))
    for layer in (0, 1):
        found = linear(report, f"model.layers.{layer}.self_attn.q_proj.weight")
        dims = find_outlier_dims(tensors(folder)[found["tensor"]].float()).tolist()
        assert sorted(d["dim"] for d in found["columns"]["dims"]) == sorted(dims) == [9, 33]
    kind = next(k for k in report["kinds"] if k["kind"] == "self_attn.q_proj")
    assert kind["column_dims"] == [{"dim": 9, "share": 1.0}, {"dim": 33, "share": 1.0}]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pieces_are_small_and_do_not_matter(name, tmp_path, monkeypatch):
    make_model(name, tmp_path)
    whole = inspect_weights(str(tmp_path))
    read = []

    def watched(self, file, offset, count):
        read.append(count)
        return original(self, file, offset, count)

    original = Source.read
    monkeypatch.setattr(Source, "read", watched)
    monkeypatch.setattr(weight_statistics, "PIECE_BYTES", 1000)
    advanced = []

    class Progress:
        def __init__(self, total, done):
            self.total = total

        def __enter__(self):
            return self

        def __exit__(self, *_):
            assert sum(advanced) == self.total

        def advance(self, count, name):
            advanced.append(count)

    pieces = inspect_weights(str(tmp_path), progress=Progress)
    assert len(advanced) > 100 and max(advanced) <= 1000 and read[-len(advanced) :] == advanced
    for ours, theirs in zip(pieces["linears"], whole["linears"], strict=True):
        assert {k: v for k, v in ours.items() if isinstance(v, float)} == pytest.approx(
            {k: v for k, v in theirs.items() if isinstance(v, float)}, rel=1e-12
        )
        assert ours["sqnr"] == pytest.approx(theirs["sqnr"], rel=1e-6)
    assert pieces["norms"] == whole["norms"] and pieces["sizes"] == whole["sizes"]


def test_a_bin_checkpoint_gives_the_same(llama, tmp_path):
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    torch.save(tensors(llama), tmp_path / "pytorch_model.bin")
    ours, theirs = inspect_weights(str(tmp_path)), inspect_weights(str(llama))
    by_name = {x["tensor"]: x for x in theirs["linears"] + theirs["norms"]}
    assert {x["tensor"]: x for x in ours["linears"] + ours["norms"]} == by_name


def test_sizes_are_those_of_the_plan(llama, tmp_path):
    sizes = {s["method"]: s["bytes"] for s in inspect_weights(str(llama))["sizes"]}
    for label, options in (("llm-int8", {"bits": 8}), ("nf4-plain", {"bits": 4, "double_quant": False}), ("nf4", {"bits": 4})):
        plan = make_plan(str(llama), tmp_path / "out", **options)
        assert sizes[label] == sum(work.output_bytes for work in plan.work)
    assert sizes["as stored"] == sum(t.nbytes for t in tensors(llama).values())


def test_values_that_are_not_finite_are_named(llama, tmp_path):
    def spoil(found):
        found[DOWN.format(0)][3, 3:5] = torch.tensor([torch.nan, -torch.inf])
        found["model.norm.weight"][0] = torch.inf

    report = inspect_weights(str(replant(llama, tmp_path / "spoiled", spoil)))
    json.dumps(report, allow_nan=False)
    found = linear(report, DOWN.format(0))
    assert found["nonfinite"] == 2 and found["absmax"] is None and found["sqnr"] == {"llm-int8": None, "nf4": None}
    assert f"{DOWN.format(0)} holds 2 NaN or infinite values" in report["notes"][0]
    assert "model.norm.weight holds 1 NaN" in report["notes"][1]
    kind = next(k for k in report["kinds"] if k["kind"] == "mlp.down_proj")
    assert kind["absmax"] == linear(report, DOWN.format(1))["absmax"]


def test_weights_of_zeros_and_a_constant_gain(llama, tmp_path):
    def flatten(found):
        found[DOWN.format(0)].zero_()
        found["model.norm.weight"].fill_(0.7)

    report = inspect_weights(str(replant(llama, tmp_path / "flat", flatten)))
    found = linear(report, DOWN.format(0))
    assert (found["absmax"], found["crest"], found["row_spread"], found["kurtosis"]) == (0.0, None, None, None)
    assert found["columns"] == {"beyond": 0, "max_z": 0.0, "dims": []} and found["largest"] == []
    norm = next(n for n in report["norms"] if n["tensor"] == "model.norm.weight")
    assert (norm["beyond"], norm["max_z"]) == (0, 0.0)


def test_of_a_quantized_checkpoint_the_norms_are_inspected(llama, tmp_path):
    qcli.quantize(str(llama), tmp_path / "nf4")
    report = inspect_weights(str(tmp_path / "nf4"))
    assert report["linears"] == report["kinds"] == [] and "quantized already" in report["notes"][0]
    assert report["model"]["quantization"] == "bitsandbytes"
    assert [s["method"] for s in report["sizes"]] == ["as stored"]
    theirs = {n["tensor"]: n for n in inspect_weights(str(llama))["norms"]}
    assert {n["tensor"]: n for n in report["norms"]} == theirs


def test_where_transformers_cannot_tell_names_and_shapes_do(llama, tmp_path):
    folder = replant(llama, tmp_path / "own", lambda found: None)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    report = inspect_weights(str(folder))
    assert "the model's code comes with the checkpoint" in report["notes"][0] and len(report["linears"]) == 14
    assert "rules by name and shape" in report["modules_decided_by"]


def test_a_tensor_that_does_not_fit_is_left_out(llama, tmp_path):
    def cut(found):
        found[DOWN.format(1)] = found[DOWN.format(1)][:, :64].contiguous()

    report = inspect_weights(str(replant(llama, tmp_path / "cut", cut)))
    misfit = f"{DOWN.format(1)} ([64, 64], the model expects [64, 128])"
    assert f"1 tensors whose shape is not the model's: {misfit}" in report["notes"]
    assert len(report["linears"]) == 14


SCRIPT = """
import json
from qcli.checkpoint import hub
from qcli.errors import HubError
from qcli.outliers.weights.inspect import inspect_weights
hub._BACK_OFF, hub._WITHOUT_RANGES = 0.01, 100_000
report = inspect_weights("org/tiny").summary()
try:
    inspect_weights("org/whole")
except HubError as e:
    print(json.dumps([report, e.message, e.hint]))
"""


def test_a_hub_model_is_read_by_ranges_and_not_kept(tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=8192,
        tie_word_embeddings=True,
    )
    folder = tmp_path / "model"
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    local = inspect_weights(str(folder))
    with running_hub() as hub:
        hub.add_repo("org/tiny", folder)
        hub.add_repo("org/whole", folder)
        hub.without_ranges.add("org/whole")
        hub.cut("model.safetensors", after=110_000, times=2)  # in the middle of a weight
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | hub.environment(tmp_path / "home")
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    report, message, hint = json.loads(done.stdout)
    for key in ("linears", "norms", "norm_dims", "kinds", "sizes"):
        assert report[key] == local[key], key
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    sent = sum(n for _, path, n in hub.requests if path.startswith("/org/tiny/") and path.endswith("model.safetensors"))
    measured = 2 * sum(x["out_features"] * x["in_features"] for x in report["linears"])
    measured += 2 * sum(n["channels"] for n in report["norms"])
    header = 100_000
    assert sent <= measured + header + 2 * 110_000 < (folder / "model.safetensors").stat().st_size
    assert "the hub sends the whole of org/whole/model.safetensors" in message and "hf download org/whole" in hint


def test_tables_and_rows(llama, tmp_path, capsys):
    def plant(found):
        for name, tensor in found.items():
            if "norm" in name:
                tensor[5] = 50.0
        found[DOWN.format(1)][5, 100] = 4.0

    report = inspect.inspect_weights(str(replant(llama, tmp_path / "planted", plant)))
    show(report)
    shown = capsys.readouterr().out
    texts = ("LlamaForCausalLM, 2 layers", "mlp.down_proj", "5 of 5", "Super weight candidates", "lm_head (kept as it is)")
    for text in texts:
        assert text in shown, text
    columns, table = rows(report)
    assert len(table) == 15 + 5 and all(len(row) == len(columns) for row in table)
    by_name = {row[0]: dict(zip(columns, row)) for row in table}
    down, norm = by_name[DOWN.format(1)], by_name["model.norm.weight"]
    assert (down["type"], down["rows"], down["columns"], down["absmax"]) == ("linear", 64, 128, 4.0)
    assert (norm["type"], norm["columns"], norm["dims"], norm["kind"]) == ("norm", 64, "5", "model.norm")
