"""A run that is killed loses nothing, and what it finishes is byte for byte what an uninterrupted run writes."""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

import qcli
from qcli.errors import CheckpointError, PlanError
from qcli.quantization import execute, shard_files, staging
from qcli.quantization.quantize import make_plan
from tests.conftest import ROOT
from tests.models import add_tokenizer, make_model


def killed(folder, after):
    """In a process of its own: quantizes, and kills itself the hard way once so many units are journalled, each synced."""
    os.chdir(folder)
    shard_files.SYNC_SECONDS = 0
    finish = staging.Staging.finish_work

    def finish_work(self, index, errors):
        finish(self, index, errors)
        if len(self.done) >= after:
            os.kill(os.getpid(), signal.SIGKILL)

    staging.Staging.finish_work = finish_work
    qcli.quantize("model", "out", settings={"max_shard_size": "60kB"})


def digest(folder) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model, and its folder quantized without interruption: 21 units."""
    folder = tmp_path_factory.mktemp("whole")
    make_model("llama", folder / "model")
    add_tokenizer(folder / "model")
    qcli.quantize(str(folder / "model"), folder / "out", settings={"max_shard_size": "60kB"})
    return folder


UNITS = 2 * 9 + 3


@pytest.mark.parametrize("after", [1, UNITS // 2, UNITS - 1, UNITS])
def test_kill_and_rerun(whole, tmp_path, after, monkeypatch):
    (tmp_path / "model").symlink_to(whole / "model")
    process = multiprocessing.get_context("fork").Process(target=killed, args=(tmp_path, after))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
    finished = {entry["unit"] for entry in journal(tmp_path)}
    assert after <= len(finished) <= UNITS
    started, start = [], execute.WorkTasks.tasks
    monkeypatch.setattr(execute.WorkTasks, "tasks", lambda self: [started.append(self.work.index), start(self)][1])
    monkeypatch.chdir(tmp_path)
    qcli.quantize("model", "out", settings={"max_shard_size": "60kB"})
    assert sorted([*started, *finished]) == list(range(UNITS))  # finished work was not done again
    assert digest(tmp_path / "out") == digest(whole / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_threads_do_not_matter(whole, tmp_path, monkeypatch):
    """Chunks of a few blocks on four threads: the same bytes, and the same measured errors in qcli.json."""
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(execute, "CHUNK_BYTES", 1000)
    qcli.quantize(str(whole / "model"), tmp_path / "several", settings={"max_shard_size": "60kB"})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    qcli.quantize(str(whole / "model"), tmp_path / "two", settings={"max_shard_size": "60kB"})
    tensors = {name: value for name, value in digest(whole / "out").items() if name.endswith("safetensors")}
    assert tensors.items() <= digest(tmp_path / "several").items()
    assert digest(tmp_path / "several") == digest(tmp_path / "two")


def journal(tmp_path):
    lines = (tmp_path / "out.partial/.qcli/journal.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def interrupted(whole, tmp_path, monkeypatch):
    """A run that stops where its sixth unit would be finished, in this process."""
    finish, calls = staging.Staging.finish_work, []

    def stop(self, index, errors):
        calls.append(index)
        if len(calls) == 6:
            raise KeyboardInterrupt
        finish(self, index, errors)

    with monkeypatch.context() as patched:
        patched.setattr(staging.Staging, "finish_work", stop)
        with pytest.raises(KeyboardInterrupt):
            qcli.quantize(str(whole / "model"), tmp_path / "out", settings={"max_shard_size": "60kB"})
    # An interrupt syncs what is finished; of the others that were in work some may be.
    assert sorted(entry["unit"] for entry in journal(tmp_path)) == sorted(calls[:5] + calls[6:])
    assert not (tmp_path / "out").exists()


def test_a_sync_that_failed_is_not_made_good_by_the_next(whole, tmp_path, monkeypatch):
    """After an error the system may drop what it had to write, and call the next fdatasync of the file a success."""
    sync, failed = os.fdatasync, []

    def fdatasync(fd):
        if not failed and os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors"):
            failed.append(fd)
            raise OSError(errno.EIO, "Input/output error")
        sync(fd)

    monkeypatch.setattr(shard_files, "SYNC_SECONDS", 0)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", fdatasync)
        with pytest.raises(CheckpointError, match="Input/output error"):
            qcli.quantize(str(whole / "model"), tmp_path / "out", settings={"max_shard_size": "60kB"})
    assert failed and (tmp_path / "out.partial" / ".qcli" / "journal.jsonl").read_bytes() == b""
    qcli.quantize(str(whole / "model"), tmp_path / "out", settings={"max_shard_size": "60kB"})
    assert digest(tmp_path / "out") == digest(whole / "out")


def test_a_cut_journal_line_is_no_promise(whole, tmp_path, monkeypatch):
    interrupted(whole, tmp_path, monkeypatch)
    path = tmp_path / "out.partial/.qcli/journal.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    qcli.quantize(str(whole / "model"), tmp_path / "out", settings={"max_shard_size": "60kB"})
    assert digest(tmp_path / "out") == digest(whole / "out")


def test_another_run_is_refused_and_says_what_differs(whole, tmp_path, monkeypatch):
    interrupted(whole, tmp_path, monkeypatch)
    with pytest.raises(PlanError) as e:
        qcli.quantize(str(whole / "model"), tmp_path / "out", method="fp4", settings={"max_shard_size": "60kB"})
    assert "was started by a run that differs" in e.value.message and 'its method was "nf4"' in e.value.message
    assert (tmp_path / "out.partial/.qcli/journal.jsonl").exists()


def test_a_second_run_is_locked_out(whole, tmp_path, monkeypatch):
    interrupted(whole, tmp_path, monkeypatch)
    fd = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        with pytest.raises(CheckpointError, match="in use by another qcli"):
            qcli.quantize(str(whole / "model"), tmp_path / "out", settings={"max_shard_size": "60kB"})
    finally:
        os.close(fd)


def test_a_foreign_partial_folder_is_left_alone(whole, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds no journal"):
        qcli.quantize(str(whole / "model"), tmp_path / "out")
    assert (tmp_path / "out.partial/thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("crash_at", [1, 2, 3])
def test_a_crash_between_the_last_renames(whole, tmp_path, monkeypatch, crash_at):
    """The state moves aside, the old folder moves aside, the new one takes its name: killed before each of them."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("old")
    rename, calls = os.rename, []

    def crash(a, b):
        if not str(a).endswith(".tmp"):
            calls.append(a)
            if len(calls) == crash_at:
                raise KeyboardInterrupt
        rename(a, b)

    options = {"settings": {"max_shard_size": "60kB"}, "overwrite": True}
    with monkeypatch.context() as patched:
        patched.setattr(staging.os, "rename", crash)
        with pytest.raises(KeyboardInterrupt):
            qcli.quantize(str(whole / "model"), tmp_path / "out", **options)
    assert len(calls) == crash_at
    qcli.quantize(str(whole / "model"), tmp_path / "out", **options)
    assert digest(tmp_path / "out") == digest(whole / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_swaps_only_at_the_end(whole, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("old")
    with pytest.raises(PlanError, match="exists already"):
        qcli.quantize(str(whole / "model"), tmp_path / "out")
    seen = []
    publish = staging.Staging.publish

    def check(self):
        seen.append((tmp_path / "out/old").read_text())
        publish(self)

    monkeypatch.setattr(staging.Staging, "publish", check)
    qcli.quantize(str(whole / "model"), tmp_path / "out", overwrite=True)
    assert seen == ["old"] and not (tmp_path / "out/old").exists() and (tmp_path / "out/config.json").exists()


def test_sigterm_is_an_interrupt(tmp_path):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8, vocab_size=64
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "qcli", "quantize", "model", "-o", "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out.partial/.qcli/journal.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in errors and "Go on with: qcli quantize model -o out" in errors and "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    assert qcli.quantize(str(tmp_path / "model"), tmp_path / "out").quantized_modules == 56


def test_non_finite_weights_stop_the_run_and_can_be_carried(whole, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    make_model("llama", model)
    state = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    state[name][3, 5] = float("nan")
    state[name][70, 1] = float("inf")
    save_file(state, model / "model.safetensors", {"format": "pt"})
    from qcli.errors import NonFiniteError

    with pytest.raises(NonFiniteError) as e:
        qcli.quantize(str(model), tmp_path / "out", double_quant=False)
    assert name in e.value.message and "holds 2 NaN or infinite values" in e.value.message
    assert "allow_nonfinite=true" in e.value.hint and not (tmp_path / "out").exists()
    finished = journal(tmp_path)
    report = qcli.quantize(str(model), tmp_path / "out", double_quant=False, settings={"allow_nonfinite": "true"})
    assert len(finished) > 5 and report.nonfinite == {name: 2}
    assert json.loads((tmp_path / "out/qcli.json").read_text())["nonfinite"] == {name: 2}
    loaded, _ = qcli.load(str(tmp_path / "out"), device="cpu")
    weight = loaded.get_submodule(name.removesuffix(".weight")).dequantize(torch.float32).view(-1, 64)
    bad = ~torch.isfinite(weight)
    assert bad.any(1).nonzero().view(-1).tolist() == [3, 70]  # their blocks are lost, nothing else


def test_values_beyond_float16_are_named(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    make_model("llama", tmp_path / "model")
    state = load_file(tmp_path / "model/model.safetensors")
    state["model.norm.weight"][7] = 1e5
    save_file(state, tmp_path / "model/model.safetensors", {"format": "pt"})
    from qcli.errors import NonFiniteError

    with pytest.raises(NonFiniteError, match="model.norm.weight: 1 values, stored BF16, are too large for float16"):
        qcli.quantize(str(tmp_path / "model"), tmp_path / "out", dtype="float16")
    state["model.norm.weight"][7] = 1
    state["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(state, tmp_path / "model/model.safetensors", {"format": "pt"})
    report = qcli.quantize(str(tmp_path / "model"), tmp_path / "out8", bits=8, dtype="float16")
    assert torch.isfinite(torch.tensor([k.errors.relative_error for k in report.kinds])).all()


def test_a_file_is_locked_where_folders_cannot_be(whole, tmp_path, monkeypatch):
    """As on NFS, which refuses a lock on what is not open for writing."""
    import errno
    import fcntl
    import stat

    lock = fcntl.flock

    def flock(fd, operation):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        lock(fd, operation)

    monkeypatch.setattr(staging.fcntl, "flock", flock)
    plan = make_plan(str(whole / "model"), tmp_path / "out", settings={"max_shard_size": "60kB"})
    with staging.Staging(plan), pytest.raises(CheckpointError, match="in use by another qcli"):
        qcli.quantize(str(whole / "model"), tmp_path / "out", settings={"max_shard_size": "60kB"})
    qcli.quantize(str(whole / "model"), tmp_path / "out", settings={"max_shard_size": "60kB"})
    assert digest(tmp_path / "out") == digest(whole / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
