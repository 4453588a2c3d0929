"""What the commands print: whole names when piped, JSON that scripts can read, the version, the plan."""

import json

import pytest
from safetensors import safe_open

import qcli
from tests.conftest import ROOT
from tests.models import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    make_model("llama", folder / "model")
    qcli.quantize(str(folder / "model"), folder / "nf4")
    qcli.quantize(str(folder / "model"), folder / "int8", bits=8)
    return folder


def test_version(quick_cli):
    assert quick_cli("--version").stdout == f"qcli {qcli.__version__}\n"


def test_help_names_every_command(quick_cli):
    text = quick_cli("--help").stdout
    for path in (ROOT / "qcli/commands").glob("[a-z]*.py"):
        assert path.stem.replace("_", "-") in text


def test_the_plan_in_tables_and_in_json(folder, quick_cli):
    text = quick_cli("quantize", folder / "model", "--dry-run", "-o", "planned")
    assert text.returncode == 0
    assert "model.layers.[0-1].post_attention_layernorm.weight" in text.stdout and "..." not in text.stdout
    plan = json.loads(quick_cli("quantize", folder / "model", "--dry-run", "--json", "-o", "planned").stdout)
    assert plan["files"] == [{"name": "model.safetensors", "bytes": (folder / "nf4/model.safetensors").stat().st_size}]
    assert f"{plan['files'][0]['bytes']:,}" in text.stdout
    with safe_open(folder / "nf4/model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(n).numel() * file.get_tensor(n).element_size() for n in file.keys())
    assert sum(t["bytes_after"] for t in plan["tensors"]) == stored
    parameters = sum(p.numel() for p in qcli.load(str(folder / "model"), device="cpu")[0].parameters())
    assert plan["bits_per_weight"] == pytest.approx(8 * stored / parameters, abs=1e-4)


def test_a_plan_with_problems_is_printed_and_fails(folder, quick_cli):
    done = quick_cli("quantize", folder / "model", "--dry-run", "-o", folder / "nf4")
    assert done.returncode == 1 and "bits per weight" in done.stdout and "exists already" in done.stderr


def test_the_report(folder, quick_cli, tmp_path):
    done = quick_cli("quantize", folder / "model", "-o", "out")
    assert done.returncode == 0
    for part in ("down_proj", "relative error", "worst 5 modules", "bits per weight", "peak memory", "next: qcli generate out"):
        assert part in done.stdout
    assert "no tokenizer" in done.stderr
    report = json.loads(quick_cli("quantize", folder / "model", "-o", "again", "--json").stdout)
    assert len(report["kinds"]) == 7 and report["quantized_modules"] == 14 and report["output"] == "again"
    assert report["output_bytes"] == (tmp_path / "again/model.safetensors").stat().st_size


@pytest.mark.parametrize("name, scheme, parts", [("nf4", "nf4", 5), ("int8", "llm-int8", 5), ("model", "bfloat16", 1)])
def test_info(folder, quick_cli, name, scheme, parts):
    original = json.loads(quick_cli("info", folder / "model", "--json").stdout)
    found = json.loads(quick_cli("info", folder / name, "--json").stdout)
    assert found["whole"] and found["parameters"] == original["parameters"] and found["architecture"] == "LlamaForCausalLM"
    schemes = {p["kind"]: p["scheme"] for p in found["parts"]}
    assert schemes["up_proj"] == scheme and schemes["embed_tokens"] == "bfloat16"
    with safe_open(folder / name / "model.safetensors", "pt") as file:
        assert found["bytes"] == sum(file.get_tensor(n).numel() * file.get_tensor(n).element_size() for n in file.keys())
    text = quick_cli("info", folder / name).stdout
    assert "files: whole" in text and scheme in text and f"{found['parameters']:,} parameters" in text


def test_the_defaults_by_name(folder, quick_cli, tmp_path):
    for arguments, name in (((), "model-nf4"), (("--bits", "8"), "model-llm-int8"), (("--method", "fp4"), "model-fp4")):
        assert quick_cli("quantize", folder / "model", *arguments).returncode == 0
        made = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert made["load_in_8bit"] == (name == "model-llm-int8")


def test_settings_of_a_method_may_be_set(folder, quick_cli, tmp_path):
    done = quick_cli("quantize", folder / "model", "-o", "out", "--set", "block_size=128", "--set", "double_quant=false")
    assert done.returncode == 0
    assert json.loads((tmp_path / "out/qcli.json").read_text())["options"] == {"block_size": 128, "double_quant": False}


def test_warnings_of_qcli_are_sentences(capsys):
    from qcli.cli import _warn
    from qcli.errors import QcliWarning

    _warn(QcliWarning("no CUDA kernels"), QcliWarning, "file.py", 7)
    assert capsys.readouterr().err == "warning: no CUDA kernels\n"
    _warn(UserWarning("of a library"), UserWarning, "file.py", 7)
    assert "file.py:7: UserWarning: of a library" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", ["quantize", "generate", "info", "evaluate", "inspect-outliers", "estimate-memory"])
def test_without_a_model_one_working_example_is_shown(command, quick_cli):
    done = quick_cli(command)
    assert done.returncode == 2 and f"qcli {command} " in done.stderr and "Traceback" not in done.stderr
