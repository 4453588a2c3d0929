"""Bad input ends in one clear sentence, the right exit code, and nothing that looks finished."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import make_model


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template") / "model"
    make_model("llama", folder)
    return folder


@pytest.fixture
def model(template, tmp_path):
    shutil.copytree(template, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def refused(quick_cli, tmp_path):
    """Runs a command that must fail: one message, the exit code, the input as it was, no output."""

    def run(*arguments, code=1, contains=()):
        before = snapshot(tmp_path / "model")
        done = quick_cli(*arguments)
        assert done.returncode == code, done.stderr
        for part in contains:
            assert part in done.stderr, done.stderr
        if code == 1:
            assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) <= 2, done.stderr
        assert snapshot(tmp_path / "model") == before
        left = [p.name for p in tmp_path.iterdir() if p.name not in ("model", "sharded") and not p.name.endswith(".partial")]
        assert left == [], left
        return done

    return run


def snapshot(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} if folder.is_dir() else None


def rewrite_header(path, change):
    """Replaces the header of a safetensors file by what `change` makes of it (an object, or raw bytes)."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = change(json.loads(data[8 : 8 + length]))
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


NAME = "model.layers.0.mlp.up_proj.weight"


def with_entry(**fields):
    def change(header):
        header[NAME] |= fields
        return header

    return change


def overlapping(header):
    header[NAME]["data_offsets"] = header["model.layers.0.mlp.gate_proj.weight"]["data_offsets"]
    return header


def twice(header):
    raw = json.dumps(header)
    entry = json.dumps(header[NAME])
    return raw.replace(f'"{NAME}": {entry}', f'"{NAME}": {entry}, "{NAME}": {entry}').encode()


HEADERS = {
    "unknown dtype": (with_entry(dtype="Q7"), 'dtype is "Q7" (a string), expected F64, I64'),
    "negative size": (with_entry(shape=[-128, 64]), "shape is [-128, 64] (a list), expected a list of a whole number"),
    "shape of text": (with_entry(shape="128"), 'shape is "128" (a string), expected a list'),
    "wrong shape": (with_entry(shape=[128, 65]), "takes 16,640 bytes, its data has 16,384"),
    "backwards": (with_entry(data_offsets=[9, 3]), "ends (3) before it begins (9)"),
    "out of range": (with_entry(data_offsets=[10**9, 10**9 + 16384]), "its data ends at byte"),
    "offsets of text": (with_entry(data_offsets=["0", "4"]), "expected a list of 2 items, each a whole number of at least 0"),
    "huge shape": (with_entry(shape=[2**62, 2**62]), "bytes, its data has"),
    "overlap": (overlapping, "overlap"),
    "duplicate name": (twice, "occurs twice"),
    "no object": (lambda header: [1, 2], "expected a JSON object"),
    "entry is a number": (lambda header: header | {NAME: 3}, "its entry is 3 (a number), expected an object"),
    "broken JSON": (lambda header: b'{"a": ', "not valid JSON"),
    "not UTF-8": (lambda header: b'{"\xff": 1}', "not valid JSON"),
    "deep nesting": (lambda header: b"[" * 90_000, "not valid JSON"),
    "metadata": (
        lambda header: header | {"__metadata__": {"a": 1}},
        '__metadata__ is {"a": 1} (an object), expected an object that maps names to strings',
    ),
    "hole": (lambda header: {k: v for k, v in header.items() if k != NAME}, "belong to no tensor"),
}


@pytest.mark.parametrize("fault", HEADERS)
@pytest.mark.parametrize("command", ["quantize", "info"])
def test_headers(fault, command, model, refused):
    change, message = HEADERS[fault]
    rewrite_header(model / "model.safetensors", change)
    refused(command, "model", contains=["model/model.safetensors", message])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: b"", "0 bytes, expected at least"),
        (lambda data: data[:5], "5 bytes, expected at least"),
        (lambda data: data[:300], "the whole file has 300"),
        (lambda data: data[:-100], "its data ends at byte"),
        (lambda data: data + b"xx", "2 bytes after the last tensor"),
        (lambda data: b"\xff" * 8 + data[8:], "the header claims"),
        (lambda data: struct.pack("<Q", 0) + data[8:], "the header claims 0 bytes"),
        (lambda data: b"<html>404 not found</html>", "the header claims"),
    ],
)
def test_truncated_and_oversized_files(change, message, model, refused):
    path = model / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    refused("quantize", "model", contains=[message])


def test_folders_and_configs(model, refused, tmp_path):
    refused("quantize", "./nowhere", contains=["there is no folder ./nowhere"])
    refused("quantize", "model/config.json", contains=["is a file, expected a model's folder"])
    (tmp_path / "model/config.json").write_text('{"a": ')
    refused("quantize", "model", contains=["model/config.json is not valid JSON"])
    (tmp_path / "model/config.json").write_text("[]")
    refused("quantize", "model", contains=["holds [] (a list), expected a JSON object"])
    (tmp_path / "model/config.json").unlink()
    refused("quantize", "model", contains=["model has no config.json"])
    refused("generate", "model", "x", contains=["model has no config.json"])
    refused("info", "model", contains=["model has no config.json"])


def test_no_weights(model, refused):
    (model / "model.safetensors").unlink()
    refused("quantize", "model", contains=["has no model.safetensors"])


def test_a_config_its_class_cannot_take(model, refused):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    refused("quantize", "model", contains=["modules=rules"])


@pytest.fixture
def sharded(tmp_path):
    make_model("llama", tmp_path / "sharded", max_shard_size="120KB")
    return tmp_path / "sharded"


def index_of(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())


def write_index(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_indexes(sharded, refused):
    good = index_of(sharded)
    for change, message in (
        (lambda m: m | {NAME: "model-00009-of-00009.safetensors"}, "shards that are not there: model-00009"),
        (lambda m: m | {NAME: "../model/model.safetensors"}, "outside its own folder"),
        (lambda m: m | {NAME: "/etc/passwd"}, "outside its own folder"),
        (lambda m: {}, "weight_map is empty"),
        (lambda m: [1], "weight_map is [1] (a list), expected an object that maps names to strings"),
        (lambda m: m | {NAME: 3}, "expected an object that maps names to strings"),
    ):
        write_index(sharded, {"weight_map": change(dict(good["weight_map"]))})
        refused("quantize", "sharded", contains=[message])
    (sharded / "model.safetensors.index.json").write_text("{")
    refused("quantize", "sharded", contains=["index.json is not valid JSON"])


@pytest.mark.parametrize("change", [lambda m: m | {"ghost.weight": m[NAME]}, lambda m: {k: v for k, v in m.items() if k != NAME}])
def test_an_index_with_a_wrong_entry_is_let_pass(change, sharded, quick_cli, tmp_path):
    assert quick_cli("quantize", "sharded", "-o", "expected").returncode == 0
    good = index_of(sharded)
    write_index(sharded, good | {"weight_map": change(dict(good["weight_map"]))})
    done = quick_cli("quantize", "sharded", "-o", "out")
    assert done.returncode == 0 and "the index" in done.stderr, done.stderr
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "expected/model.safetensors").read_bytes()


def test_the_same_tensor_in_two_shards(sharded, refused):
    first, second = sorted(sharded.glob("*.safetensors"))
    state = load_file(second)
    name = next(iter(load_file(first)))
    save_file(state | {name: torch.zeros(2, dtype=torch.bfloat16)}, second)
    refused("quantize", "sharded", contains=[f"the tensor {name} is in both"])


def test_missing_and_misshaped_tensors_are_reported_together(model, quick_cli):
    state = load_file(model / "model.safetensors")
    del state["model.norm.weight"]
    state[NAME] = torch.zeros(130, 64, dtype=torch.bfloat16)
    save_file(state, model / "model.safetensors", {"format": "pt"})
    done = quick_cli("quantize", "model", "--skip", "*.nothing")
    assert done.returncode == 1
    for part in (
        "3 problems",
        "1 parameters that no tensor of the checkpoint provides: model.norm.weight",
        f"{NAME} ([130, 64], the model expects [128, 64])",
        "*.nothing",
    ):
        assert part in done.stderr


def test_quantized_input(model, quick_cli, refused, tmp_path):
    assert quick_cli("quantize", "model", "-o", "sharded").returncode == 0
    refused("quantize", "sharded", contains=["is quantized already (bitsandbytes)"])
    refused("generate", "sharded", "x", "--bits", "4", contains=["is quantized already"])


def test_another_quantization_is_named(model, refused):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "quip", "bits": 4}}))
    refused("quantize", "model", contains=["quantized already (quip)"])
    refused("generate", "model", "x", contains=["quantized by quip"])


def test_usage(model, refused):
    for arguments, message in (
        (("--method", "nf5"), "there is no method 'nf5'; nearest: nf4"),
        (("--bits", "5"), "bits is 5, expected 4, 8, 3 or 2"),
        (("--bits", "8", "--method", "nf4"), "nf4 stores 4 bits"),
        (("--block-size", "48"), "block size is 48"),
        (("--bits", "8", "--block-size", "64"), "llm-int8 has no option 'block_size'"),
        (("--threshold", "3"), "nf4 has no option 'threshold'"),
        (("--bits", "8", "--threshold", "-1"), "threshold is -1"),
        (("--dtype", "int8"), "dtype is 'int8'"),
        (("--device", "tpu"), "device is 'tpu'"),
        (("--set", "max_shard"), "has no '='"),
        (("--set", "max_shard=1GB"), "nearest: max_shard_size"),
        (("--set", "max_shard_size=big"), "max_shard_size is 'big'"),
        (("--set", "allow_nonfinite=perhaps"), "expected true or false"),
        (("--set", "compute_dtype=int8"), "compute_dtype is 'int8'"),
    ):
        refused("quantize", "model", *arguments, code=2, contains=[message])
    refused("quantize", "model", "--no-such-option", code=2, contains=["No such option"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu(model, refused):
    refused("quantize", "model", "--device", "cuda", contains=["--device cuda", "Use --device cpu"])
    refused("generate", "model", "x", "--device", "cuda", contains=["--device cuda"])


def test_unreadable_files(model, refused):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").mkdir()
    refused("quantize", "model", contains=["has no model.safetensors"])


def test_a_file_that_cannot_be_opened(model, refused, monkeypatch):
    import builtins

    real = builtins.open

    def closed(path, *arguments, **options):
        if str(path).endswith("model.safetensors"):
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **options)

    monkeypatch.setattr(builtins, "open", closed)
    refused("quantize", "model", contains=["cannot read model/model.safetensors: Permission denied"])


def test_the_disk_fills_up(model, refused, monkeypatch, tmp_path):
    import errno
    import os

    from qcli.quantization import staging

    real, written = os.pwrite, []

    def full(fd, data, offset):
        written.append(len(data))
        if sum(written) > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(staging.os, "pwrite", full)
        refused("quantize", "model", "-o", "out", contains=["the disk is full", "run the same command again"])
    assert (tmp_path / "out.partial").is_dir() and not (tmp_path / "out").exists()


def test_too_little_disk_is_a_problem_of_the_plan(model, refused, monkeypatch):
    import collections
    import shutil as shell

    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shell, "disk_usage", lambda path: usage(10**9, 10**9, 12_345))
    refused("quantize", "model", contains=["of disk at", "12.35 kB are free"])


def test_an_output_that_exists(model, quick_cli, tmp_path):
    (tmp_path / "out").mkdir()
    done = quick_cli("quantize", "model", "-o", "out")
    assert done.returncode == 1 and "out exists already; pass --overwrite" in done.stderr
    done = quick_cli("quantize", "model", "-o", "model", "--overwrite")
    assert done.returncode == 1 and "is the model itself" in done.stderr


class Evil:
    def __reduce__(self):
        return (print, ("pickle ran",))


def test_pickles_are_not_run(model, refused, capsys):
    state = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(state | {"evil": Evil()}, model / "pytorch_model.bin")
    done = refused("quantize", "model", contains=["holds more than tensors"])
    assert "pickle ran" not in done.stdout + done.stderr
    torch.save(state, model / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    refused("quantize", "model", contains=["is not a zip file"])
    torch.save({"state_dict": state}, model / "pytorch_model.bin")
    refused("quantize", "model", contains=["state_dict is not a tensor"])
    torch.save({"w": torch.zeros(4, 6).t()}, model / "pytorch_model.bin")
    refused("quantize", "model", contains=["stored with strides"])
    data = (model / "pytorch_model.bin").read_bytes()
    (model / "pytorch_model.bin").write_bytes(data[: len(data) // 2])
    refused("quantize", "model", contains=["pytorch_model.bin"])


def test_generate_refusals(model, refused, tmp_path):
    refused("generate", "model", "x", contains=["model has no tokenizer"])
    refused("generate", "model", "x", "--temperature", "-1", code=2, contains=["--temperature is -1"])
    refused("generate", "model", "x", "--top-p", "2", code=2, contains=["--top-p is 2"])
    refused("generate", "model", "x", "--prompt-file", "y", code=2, contains=["both given"])
    refused("generate", "model", "--prompt-file", "nowhere.txt", code=2, contains=["nowhere.txt"])


def test_a_quantized_folder_that_lost_a_tensor(model, quick_cli, refused, tmp_path):
    assert quick_cli("quantize", "model", "-o", "sharded").returncode == 0
    path = tmp_path / "sharded/model.safetensors"
    state = load_file(path)
    del state[f"{NAME}.absmax"]
    save_file(state, path, {"format": "pt"})
    refused("generate", "sharded", "x", contains=[f"{NAME} lacks {NAME}.absmax"])
    state = load_file(path)
    del state["model.norm.weight"]
    state[f"{NAME}.absmax"] = torch.zeros(128, dtype=torch.uint8)
    state["lm_head.weight"] = torch.zeros(3, 64)
    save_file(state, path, {"format": "pt"})
    refused(
        "generate",
        "sharded",
        "x",
        contains=["1 missing: model.norm.weight", "1 misshaped: lm_head.weight (stored [3, 64], the model has [256, 64])"],
    )
