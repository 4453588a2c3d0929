"""A quantization divided over the machines of a cluster: each worker takes whole weight files of the output.

The plan goes to the workers as JSON. A worker reads the tensors that its files are made of, and writes the files into OUT.partial,
which all of them see, at the places that the plan says. So the bytes are those of one machine's run, whoever wrote them, and a file
that two of them write is the same file. Each has a journal of its own.
"""

import hashlib
import json
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qcli.checkpoint.hub_upload import Branch
from qcli.cluster.engine import Engine
from qcli.cluster.jobs import Told
from qcli.cluster.pool import Pool, Task
from qcli.devices import pick_device
from qcli.errors import CheckpointError, ClusterError
from qcli.methods.errors import ErrorSums
from qcli.progress import Bar
from qcli.quantization.division import division
from qcli.quantization.execute import execute
from qcli.quantization.plan import Plan
from qcli.quantization.plan_json import from_json, to_json
from qcli.quantization.shard_files import JOURNAL, STATE, ShardFiles
from qcli.quantization.staging import Staging

LATE = 60.0  # seconds that a shared file system may take to show a file that another machine wrote
JOB, JOB_WITH_TEXTS = f"{__name__}:ShardJob", "qcli.quantization.texts_on_cluster:QuantizationJob"


def branch_of(plan: Plan, repo: str) -> Branch:
    """The branch of the repository `repo` that the plan's weight files go to, the same for a run that goes on."""
    identity = hashlib.sha256(json.dumps(plan.identity, sort_keys=True).encode()).hexdigest()
    return Branch(repo, f"qcli-{identity[:16]}")


def specification(plan: Plan, folder: Path, device: str, branch: Branch | None) -> dict[str, Any]:
    """What a ShardJob is made of."""
    value: dict[str, Any] = to_json(plan)
    if not plan.source.is_hub:
        value["source"]["label"] = str(Path(plan.source.label).absolute())
    return {"plan": json.dumps(value), "folder": str(folder.absolute()), "device": device, "late": LATE, "branch": branch}


@contextmanager
def pool(
    address: str | None, workers: int | None, plan: Plan, staging: Staging, device: str, branch: Branch | None, bar: Bar
) -> Iterator[Pool | None]:
    """The workers of the cluster at `address` for a plan; None without an address. With a `branch` they upload what they write."""
    if address is None:
        yield None
        return
    spec = specification(plan, staging.folder, device, branch)
    job = JOB_WITH_TEXTS if plan.calibration else JOB
    with Engine(address) as engine, Pool(engine, job, spec, workers, gpus=device != "cpu", bar=bar) as found:
        if branch is None:
            _greet(found, staging)
        yield found


def _greet(pool: Pool, staging: Staging) -> None:
    """Makes sure that every worker sees the output's folder, and that it is the same folder. Raises ClusterError."""
    token = uuid.uuid4().hex
    staging.add_file(f"{STATE}/{token}", b"")
    tasks = [Task("meet", (token,), 0, "the shared folder", worker.slot) for worker in pool.meet()]
    for _, (host, seen) in pool.deal(tasks):
        _visible(staging.state / seen, host, staging.folder)
        (staging.state / seen).unlink()
    (staging.state / token).unlink()


def execute_on(pool: Pool, plan: Plan, staging: Staging, branch: Branch | None) -> None:
    """What `execute` does, by the workers of a pool of ShardJobs. Raises what it raises, ClusterError and HubError."""
    staging.sync()
    if branch:
        branch.make()
        there = branch.sizes(shard.name for shard in plan.shards)
        lost = {shard.name for shard in plan.shards if there.get(shard.name) != shard.size}
        for index in [i for i in staging.done if plan.work[i].outputs[0].file in lost]:
            del staging.done[index]
    left = [work.index for work in plan.work if work.index not in staging.done]
    tasks = [
        Task("shard", (file, [work.index for work in works]), sum(work.info.nbytes for work in works), file)
        for file, works in division(plan, left)
    ]
    for _, done in pool.deal(tasks):
        for index, sums in done:
            if branch:
                staging.finish_work(index, ErrorSums(*sums))
            else:
                staging.done[index] = ErrorSums(*sums)
        staging.sync()
    for shard in plan.shards if branch is None else ():
        _visible(staging.folder / shard.name, "this machine", staging.folder, shard.size)


def publish(plan: Plan, staging: Staging, branch: Branch) -> str:
    """Puts the whole output on the repository's main branch, and drops what was staged here. The repository's address."""
    files = [str(path.relative_to(staging.folder)) for path in sorted(staging.folder.rglob("*")) if path.is_file()]
    files = [name for name in files if not name.startswith(f"{STATE}/")]
    url = branch.publish({shard.name: shard.size for shard in plan.shards}, staging.folder, files)
    staging.drop()
    return url


class ShardJob:
    """On a worker: writes files of the output."""

    def __init__(self, spec: dict[str, Any]):
        self.plan = from_json(json.loads(spec["plan"]))
        self.folder, self.device, self.late = Path(spec["folder"]), pick_device(spec["device"]), spec["late"]
        self.name = f"{Path(JOURNAL).stem}-{uuid.uuid4().hex}.jsonl"
        self.branch: Branch | None = spec["branch"]

    def meet(self, told: Told, token: str) -> tuple[str, str]:
        """Looks for the driver's file in the shared folder, and leaves one there. Returns this machine's name and the file's."""
        host, state = socket.gethostname(), self.folder / STATE
        _visible(state / token, host, self.folder, late=self.late)
        seen = f"{token}-{uuid.uuid4().hex}"
        try:
            (state / seen).touch()
        except OSError as e:
            raise CheckpointError(f"{host} cannot write into {self.folder}: {e.strerror}", "Give it the right to.") from e
        return host, seen

    def shard(self, told: Told, file: str, indices: list[int]) -> list[tuple[int, tuple[float, float, int]]]:
        """Writes what `indices` name of the plan's work into `file`. The errors of each. With a branch the file is written on this
        machine's own disk, whole, uploaded, and removed."""
        if self.branch is None:
            return self._shard(told, self.folder, file, indices)
        with tempfile.TemporaryDirectory(prefix="qcli-") as name:
            folder = Path(name)
            (folder / STATE).mkdir()
            whole = [work.index for work in self.plan.work if work.outputs[0].file == file]
            done = self._shard(told, folder, file, whole)
            self.branch.add(folder / file)
            return done

    def _shard(self, told: Told, place: Path, file: str, indices: list[int]) -> list[tuple[int, tuple[float, float, int]]]:
        files = ShardFiles(self.plan, place)
        files.open_journal(self.name)
        try:
            if (place / file).exists():
                files.read_journals()  # a worker died at this file
            wanted = set(indices)
            told.done = sum(self.plan.work[i].info.nbytes for i in wanted & files.done.keys())
            with tempfile.TemporaryDirectory(prefix="qcli-") as folder:
                self.plan.source.download_to(Path(folder), parts=True)
                execute(self.plan, files, self.device, told.advance, only=wanted)
            return [(i, (e.squared_error, e.squared_norm, e.nonfinite)) for i in indices for e in [files.done[i]]]
        finally:
            files.close()


def _visible(path: Path, host: str, folder: Path, size: int | None = None, late: float | None = None) -> None:
    """Waits until a file of another machine is there. Raises ClusterError."""
    until = time.monotonic() + (LATE if late is None else late)
    while True:
        try:
            if size is None or path.stat().st_size == size:
                path.stat()
                return
        except FileNotFoundError:
            pass
        if time.monotonic() > until:
            raise ClusterError(
                f"{host} does not see in {folder} what the others write there",
                "The output must lie on a file system that every machine shares; or upload it: --push-to-hub.",
            )
        time.sleep(0.1)
