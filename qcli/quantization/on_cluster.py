"""A quantization divided over the machines of a cluster: each worker takes whole weight files of the output.

The plan goes to the workers as JSON. A worker reads the tensors that its files are made of, and writes the files into OUT.partial,
which all of them see, at the places that the plan says. So the bytes are those of one machine's run, whoever wrote them, and a file
that two of them write is the same file. Each has a journal of its own.
"""

import json
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def specification(plan: Plan, folder: Path, device: str) -> dict[str, Any]:
    """What a ShardJob is made of."""
    value: dict[str, Any] = to_json(plan)
    if not plan.source.is_hub:
        value["source"]["label"] = str(Path(plan.source.label).absolute())
    return {"plan": json.dumps(value), "folder": str(folder.absolute()), "device": device, "late": LATE}


@contextmanager
def pool(address: str | None, workers: int | None, plan: Plan, staging: Staging, device: str, bar: Bar) -> Iterator[Pool | None]:
    """The workers of the cluster at `address` for a plan; None without an address."""
    if address is None:
        yield None
        return
    spec = specification(plan, staging.folder, device)
    job = JOB_WITH_TEXTS if plan.calibration else JOB
    with Engine(address) as engine, Pool(engine, job, spec, workers, gpus=device != "cpu", bar=bar) as found:
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


def execute_on(pool: Pool, plan: Plan, staging: Staging) -> None:
    """What `execute` does, by the workers of a pool of ShardJobs. Raises what it raises, and ClusterError."""
    staging.sync()
    left = [work.index for work in plan.work if work.index not in staging.done]
    tasks = [
        Task("shard", (file, [work.index for work in works]), sum(work.info.nbytes for work in works), file)
        for file, works in division(plan, left)
    ]
    for _, done in pool.deal(tasks):
        staging.done.update({index: ErrorSums(*sums) for index, sums in done})
    for shard in plan.shards:
        _visible(staging.folder / shard.name, "this machine", staging.folder, shard.size)


class ShardJob:
    """On a worker: writes files of the output."""

    def __init__(self, spec: dict[str, Any]):
        self.plan = from_json(json.loads(spec["plan"]))
        self.folder, self.device, self.late = Path(spec["folder"]), pick_device(spec["device"]), spec["late"]
        self.name = f"{Path(JOURNAL).stem}-{uuid.uuid4().hex}.jsonl"

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
        """Writes what `indices` name of the plan's work into `file`. The errors of each."""
        files = ShardFiles(self.plan, self.folder)
        files.open_journal(self.name)
        try:
            if (self.folder / file).exists():
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
