"""`quantize --cluster` on a Ray cluster of two machines on loopback: the bytes of one machine's run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

import qcli
from qcli.errors import CheckpointError, ClusterError, NonFiniteError, PlanError, UsageError
from qcli.quantization import on_cluster
from qcli.quantization.quantize import make_plan
from tests.cluster.conftest import HOST
from tests.conftest import ROOT
from tests.models import add_tokenizer, make_model
from tests.quantization.test_resume import digest

SETTINGS = {"max_shard_size": "25kB"}
MODEL = ROOT / "examples" / "demo-model"
CALIBRATED = {"bits": 4, "calibrate": True, "check": False, "tokens": 3000, "settings": {"sequence_length": 256}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model, and its folder quantized by one machine."""
    folder = tmp_path_factory.mktemp("whole")
    make_model("llama", folder / "model")
    add_tokenizer(folder / "model")
    qcli.quantize(str(folder / "model"), folder / "out", settings=SETTINGS)
    assert len(list((folder / "out").glob("*.safetensors"))) >= 5
    return folder


def workers_of(pid: int) -> list[psutil.Process]:
    """The processes of qcli's workers, of any cluster that is a descendant of a process."""
    found = psutil.Process(pid).children(recursive=True)
    return [p for p in found if p.status() != psutil.STATUS_ZOMBIE and "Host" in " ".join(p.cmdline())]


def test_the_bytes_of_one_machine(ray_cluster, whole, tmp_path):
    report = qcli.quantize(str(whole / "model"), tmp_path / "out", settings=SETTINGS, cluster=ray_cluster.address)
    assert digest(tmp_path / "out") == digest(whole / "out")
    assert len(report.workers) == 2 and sum(each.bytes for each in report.workers) == report.source_bytes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("workers", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 3])
def test_calibrated_the_bytes_of_one_machine(ray_cluster, calibrated, tmp_path, workers):
    qcli.quantize(str(MODEL), tmp_path / "out", cluster=ray_cluster.address, workers=workers, **CALIBRATED)
    assert digest(tmp_path / "out") == digest(calibrated)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated") / "out"
    qcli.quantize(str(MODEL), folder, **CALIBRATED)
    return folder


@pytest.mark.slow
def test_a_killed_worker_and_another_qcli_go_on(ray_cluster, whole, tmp_path, monkeypatch):
    """A worker that died left a file half written, and a journal that ends within a line."""
    stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        qcli.quantize(str(whole / "model"), tmp_path / "out", settings=SETTINGS, cluster=ray_cluster.address)
    monkeypatch.undo()
    partial = tmp_path / "out.partial"
    journals = sorted((partial / ".qcli").glob("journal-*.jsonl"))
    noted = [line for path in journals for line in path.read_text().splitlines()]
    assert len(noted) >= 2 and not (tmp_path / "out").exists()
    with journals[0].open("a") as file:
        file.write('{"unit": 1')
    report = qcli.quantize(str(whole / "model"), tmp_path / "out", settings=SETTINGS)  # on one machine
    assert digest(tmp_path / "out") == digest(whole / "out") and not report.workers


def stop_after(monkeypatch, count):
    """Ctrl-C once so many files are written."""
    deal = on_cluster.Pool.deal

    def dealt(self, tasks):
        for number, found in enumerate(deal(self, tasks)):
            yield found
            if tasks[0].method == "shard" and number + 1 == count:
                raise KeyboardInterrupt

    monkeypatch.setattr(on_cluster.Pool, "deal", dealt)


@pytest.mark.slow
def test_what_one_machine_began_a_cluster_ends(ray_cluster, whole, tmp_path, monkeypatch):
    from qcli.quantization.staging import Staging

    finish = Staging.finish_work

    def finish_work(self, index, errors):
        finish(self, index, errors)
        if index == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "finish_work", finish_work)
    with pytest.raises(KeyboardInterrupt):
        qcli.quantize(str(whole / "model"), tmp_path / "out", settings=SETTINGS)
    monkeypatch.undo()
    qcli.quantize(str(whole / "model"), tmp_path / "out", settings=SETTINGS, cluster=ray_cluster.address, workers=3)
    assert digest(tmp_path / "out") == digest(whole / "out")


def test_a_second_driver_is_refused(ray_cluster, whole, tmp_path):
    from qcli.quantization.staging import Staging

    plan = make_plan(str(whole / "model"), tmp_path / "out", settings=SETTINGS, on_cluster=True)
    with Staging(plan), pytest.raises(CheckpointError, match="in use by another qcli"):
        qcli.quantize(str(whole / "model"), tmp_path / "out", settings=SETTINGS, cluster=ray_cluster.address)


@pytest.mark.slow
def test_a_worker_says_what_is_wrong_with_a_weight(ray_cluster, whole, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(whole / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(NonFiniteError, match=name):
        qcli.quantize(str(tmp_path / "model"), tmp_path / "out", settings=SETTINGS, cluster=ray_cluster.address)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_folder_that_workers_do_not_see(ray_cluster, whole, tmp_path, monkeypatch):
    """The driver looks for the files of workers in another place than they write to."""
    monkeypatch.setattr(on_cluster, "LATE", 0.3)
    found = on_cluster.specification
    monkeypatch.setattr(on_cluster, "specification", lambda plan, folder, *rest: found(plan, tmp_path / "elsewhere.partial", *rest))
    (tmp_path / "elsewhere.partial" / ".qcli").mkdir(parents=True)
    with pytest.raises(ClusterError, match="does not see in .* what the others write there"):
        qcli.quantize(str(whole / "model"), tmp_path / "out", settings=SETTINGS, cluster=ray_cluster.address)


@pytest.mark.parametrize(
    "address, kind, message",
    [
        ("nonsense", UsageError, "--cluster is 'nonsense'"),
        ("ray://127.0.0.2:10001", UsageError, "--cluster is 'ray://"),
        ("127.0.0.2:1", ClusterError, "nothing listens at 127.0.0.2:1"),
        ("127.0.0.2:99999", ClusterError, "nothing listens"),
    ],
)
def test_no_cluster_answers(tmp_path, address, kind, message):
    with pytest.raises(kind, match=message):
        qcli.quantize(str(MODEL), tmp_path / "out", cluster=address)
    assert not (tmp_path / "out").exists()


def test_what_a_cluster_cannot_do_is_a_problem_of_the_plan(tmp_path):
    options = {"calibrate": True, "on_cluster": True}
    sequential = make_plan(str(MODEL), tmp_path / "out", bits=4, settings={"order": "sequential"}, **options)
    assert any("order=sequential" in problem for problem in sequential.problems)
    fisher = make_plan(str(MODEL), tmp_path / "out", method="squeezellm", **options)
    assert any("gradients pass a model on one machine" in problem for problem in fisher.problems)
    with pytest.raises(PlanError):
        sequential.check()


COMMAND = [sys.executable, "-m", "qcli", "quantize"]


def started(address, folder, *options):
    """The command, in a process of its own."""
    command = [*COMMAND, str(MODEL), "--bits", "4", "-o", str(folder / "out"), "--cluster", address, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def many_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files") / "out"
    qcli.quantize(str(MODEL), folder, bits=4, settings={"max_shard_size": "30kB"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_random_kills_of_workers(ray_cluster, many_files, tmp_path, seed):
    rng = random.Random(seed)
    process = started(ray_cluster.address, tmp_path, "--workers", "3", "--set", "max_shard_size=30kB")
    deadline = time.monotonic() + 120
    kills = 0
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(rng.uniform(0.05, 1.5))
        if kills < 4 and (found := workers_of(os.getpid())):
            os.kill(rng.choice(found).pid, signal.SIGKILL)
            kills += 1
    out, err = process.communicate(timeout=120)
    if process.returncode:  # the same file three times: said so, and the same command goes on
        assert "workers died 3 times" in err
        assert started(ray_cluster.address, tmp_path, "--set", "max_shard_size=30kB").wait(120) == 0
    assert kills and digest(tmp_path / "out") == digest(many_files)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_killed_driver_is_started_again(ray_cluster, many_files, tmp_path, seed):
    options = ("--set", "max_shard_size=30kB")
    process = started(ray_cluster.address, tmp_path, "--workers", "2", *options)
    journals = tmp_path / "out.partial" / ".qcli"
    while process.poll() is None and not [p for p in journals.glob("journal-*.jsonl") if p.stat().st_size]:
        time.sleep(0.01)
    time.sleep(0.05 * seed)
    process.kill()
    process.communicate()
    again = started(ray_cluster.address, tmp_path, "--workers", "3", *options)
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert digest(tmp_path / "out") == digest(many_files)


@pytest.mark.slow
def test_a_worker_of_a_calibration_dies(ray_cluster, calibrated, tmp_path):
    """Whoever takes its place passes the earlier blocks again."""
    options = ["--calibrate", "--no-check", "--tokens", "3000", "--set", "sequence_length=256", "--workers", "2"]
    command = started(ray_cluster.address, tmp_path, *options)
    journal = tmp_path / "out.partial" / ".qcli" / "journal.jsonl"
    while command.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.01)
    os.kill(workers_of(os.getpid())[0].pid, signal.SIGKILL)
    _, err = command.communicate(timeout=240)
    assert command.returncode == 0 and "died" in err, err
    assert digest(tmp_path / "out") == digest(calibrated)


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done(ray_cluster, many_files, tmp_path):
    process = started(ray_cluster.address, tmp_path, "--set", "max_shard_size=30kB")
    journals = tmp_path / "out.partial" / ".qcli"
    while process.poll() is None and not [p for p in journals.glob("journal-*.jsonl") if p.stat().st_size]:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "finished work is kept" in err and "--cluster" in err
    assert not workers_of(os.getpid())
    again = started(ray_cluster.address, tmp_path, "--json", "--set", "max_shard_size=30kB")
    out, err = again.communicate(timeout=120)
    assert digest(tmp_path / "out") == digest(many_files)
    found = json.loads(out)["workers"]
    assert len(found) == 2 and 0 < sum(each["bytes"] for each in found)
    assert list(found[0]) == ["host", "threads", "tasks", "bytes", "seconds"]  # as docs/stability.md has them


@pytest.mark.slow
def test_three_machines_of_which_one_leaves(ray_cluster, many_files, tmp_path):
    node = ray_cluster.add_node(num_cpus=1, object_store_memory=80 << 20, include_dashboard=False, node_ip_address=HOST)
    process = started(ray_cluster.address, tmp_path, "--set", "max_shard_size=30kB")
    journals = tmp_path / "out.partial" / ".qcli"
    while process.poll() is None and len(list(journals.glob("journal-*.jsonl"))) < 3:
        time.sleep(0.01)
    ray_cluster.remove_node(node)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert digest(tmp_path / "out") == digest(many_files)
