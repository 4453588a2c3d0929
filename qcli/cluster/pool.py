"""Deals tasks to the workers of a cluster, and deals those of a worker that dies again.

Who is free takes the next task, so that a fast machine does more. A task may belong to a slot: a worker that keeps something
between tasks, as the hidden states of its texts. If that worker dies, the one that takes its slot makes what was kept again.
"""

import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

from qcli import errors
from qcli.cluster.engine import Died, Node
from qcli.cluster.installed import difference, fingerprint
from qcli.cluster.jobs import Failed, Hello, WorkerSummary
from qcli.errors import ClusterError, QcliError
from qcli.progress import Bar, WorkerShown

DEATHS = 3  # of workers at the same task, before it is given up
_POLL = 0.5  # seconds between two looks at the workers
_RATE_SECONDS = 10.0  # over which a rate is taken
_SLOW = 0.5  # of the median rate
PATIENCE = 60.0  # seconds that those who are ready wait for others


class Works(Protocol):
    """What a pool needs of an engine: see qcli.cluster.engine.Engine."""

    def nodes(self) -> list[Node]: ...
    def start(self, kind: str, node: Node, threads: int, cpus: float, gpus: int) -> Any: ...
    def call(self, worker: Any, method: str, *arguments: Any) -> Any: ...
    def share(self, value: Any) -> Any: ...
    def wait(self, calls: Sequence[Any], seconds: float) -> list[Any]: ...
    def result(self, call: Any) -> Any: ...
    def stop(self, worker: Any) -> None: ...


@dataclass(frozen=True)
class Task:
    """A call of the job's `method`. `size` is in bytes of progress, `name` for people. With a `slot` that worker alone takes it."""

    method: str
    arguments: tuple[Any, ...]
    size: int
    name: str
    slot: int | None = None


@dataclass
class Worker:
    """One place for a worker. `actor` is None once no machine can have it."""

    slot: int
    node: Node
    threads: int
    cpus: float  # of the machine's that it takes
    gpus: int
    actor: Any = None
    hello: Hello | None = None
    ready: bool = False
    task: Task | None = None
    number: int = 0  # of the call under way
    done: int = 0  # bytes of the task under way
    doing: str = ""
    finished: int = 0  # bytes of the tasks it has finished
    tasks: int = 0
    began: float = 0.0  # the task under way
    seconds: float = 0.0  # with a task
    history: deque[tuple[float, int]] = field(default_factory=deque)  # (time, bytes), of the last seconds

    @property
    def host(self) -> str:
        return self.hello.host if self.hello else self.node.address

    @property
    def rate(self) -> float:
        """Bytes a second, of late."""
        if len(self.history) < 2:
            return 0.0
        (began, first), (ended, last) = self.history[0], self.history[-1]
        return max(last - first, 0) / max(ended - began, 1e-9)


class Pool:
    """Workers for jobs of `kind` ("module:Class"), each made of `spec`, which is plain data. `wanted` is their number: one for each
    machine if None. What the user should know is a QcliWarning, and `bar` hears of progress. Use as a context manager: all workers
    end with it.

    Raises ClusterError where no worker can do the work, and what a job raises for the user.
    """

    def __init__(self, engine: Works, kind: str, spec: Any, wanted: int | None, *, gpus: bool = False, bar: Bar | None = None):
        self.engine, self.kind, self.bar = engine, kind, bar
        nodes = engine.nodes()
        if not nodes:
            raise ClusterError("no machine of the cluster has a free CPU", "Look at it with `ray status`.")
        self._spec = engine.share(spec)
        count = wanted or len(nodes)
        on_node = Counter(nodes[i % len(nodes)].id for i in range(count))
        self.workers: list[Worker] = []
        self.deaths = 0
        self._left: deque[Task] = deque()
        self._of_slot: dict[int, deque[Task]] = {}
        self._calls: dict[Any, tuple[Worker, str]] = {}
        self._asked: dict[Any, Worker] = {}
        self._tried: Counter[object] = Counter()
        self._told = 0
        self._looked = time.monotonic()
        for i in range(count):
            node = nodes[i % len(nodes)]
            share = node.cpus / on_node[node.id]
            threads = max(int(share), 1)
            worker = Worker(i, node, threads, min(share, threads), int(gpus and node.gpus >= on_node[node.id]))
            self.workers.append(worker)
            self._start(worker)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self.workers:
            if worker.actor is not None:
                self.engine.stop(worker.actor)

    def _start(self, worker: Worker) -> None:
        worker.actor = self.engine.start(self.kind, worker.node, worker.threads, worker.cpus, worker.gpus)
        worker.hello, worker.ready, worker.task, worker.done = None, False, None, 0
        worker.history.clear()
        self._calls[self.engine.call(worker.actor, "hello")] = worker, "hello"

    def meet(self) -> list[Worker]:
        """The workers that are ready, once every one of them is or is left out, or has let the others wait for too long."""
        since = None
        while late := [worker for worker in self.workers if worker.actor is not None and not worker.ready]:
            self._turn()
            since = since or (time.monotonic() if len(late) < len(self.workers) else None)
            if since is not None and time.monotonic() - since > PATIENCE:
                hosts = ", ".join(sorted({worker.host for worker in late}))
                _warn(f"begins without {len(late)} of {len(self.workers)} workers: others hold the CPUs of {hosts}")
                break
        return [worker for worker in self.workers if worker.ready]

    def deal(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        """Each task with what it returned, as they end. The first of `tasks` are dealt first."""
        self._left = deque(task for task in tasks if task.slot is None)
        self._of_slot = {task.slot: deque(t for t in tasks if t.slot == task.slot) for task in tasks if task.slot is not None}
        ended = 0
        while ended < len(tasks):
            for worker in self.workers:
                if worker.actor is None and self._of_slot.get(worker.slot):
                    name = self._of_slot[worker.slot][0].name
                    raise ClusterError(f"no machine can take the place of {worker.host} at {name}", "Finished work is kept: rerun.")
                if worker.ready and worker.task is None and (queue := self._of_slot.get(worker.slot) or self._left):
                    self._give(worker, queue.popleft())
            for task, value in self._turn():
                ended += 1
                yield task, value

    def share(self, value: Any) -> Any:
        """What a task may have among its arguments in place of `value`, which then reaches each machine once."""
        return self.engine.share(value)

    def _turn(self) -> list[tuple[Task, Any]]:
        """Waits until something happens, and sees to it. The tasks that have ended, with what they returned."""
        found = []
        self._look()
        for call in self.engine.wait([*self._calls, *self._asked], _POLL):
            if call in self._asked:
                self._heard(call)
                continue
            if call not in self._calls:
                continue  # a question to a worker that was found dead just now
            worker, what = self._calls.pop(call)
            try:
                value = self.engine.result(call)
            except Died as e:
                self._lost(worker, str(e))
                continue
            if isinstance(value, Failed):
                raise _error(value, len({w.host for w in self.workers}) > 1)
            if what == "hello":
                self._met(worker, value)
            elif what == "begin":
                worker.ready = True
            else:
                found.append((self._finished(worker), value))
        return found

    def _give(self, worker: Worker, task: Task) -> None:
        worker.task, worker.done, worker.doing, worker.number = task, 0, task.name, worker.number + 1
        worker.began = time.monotonic()
        call = self.engine.call(worker.actor, "call", worker.number, task.method, *task.arguments)
        self._calls[call] = worker, "call"

    def _finished(self, worker: Worker) -> Task:
        task = worker.task
        assert task is not None
        worker.task, worker.done = None, 0
        worker.finished, worker.tasks = worker.finished + task.size, worker.tasks + 1
        worker.seconds += time.monotonic() - worker.began
        self._show()
        return task

    def _met(self, worker: Worker, hello: Hello) -> None:
        worker.hello = hello
        other = difference(fingerprint(), hello.installed)
        if other is None:
            self._calls[self.engine.call(worker.actor, "begin", self._spec)] = worker, "begin"
            return
        self.engine.stop(worker.actor)
        worker.actor = None
        _warn(f"{worker.host} is left out: it has {other}")
        self._refuse_if_alone(f"no machine has the qcli of this one; {worker.host} has {other}")

    def _lost(self, worker: Worker, why: str) -> None:
        """Puts another worker in the place of one that died."""
        task, host = worker.task, worker.host
        if task is not None:
            (self._left if task.slot is None else self._of_slot[task.slot]).appendleft(task)
        self.deaths += 1
        self._asked = {call: its for call, its in self._asked.items() if its is not worker}
        if "No module named" in why:
            worker.actor, worker.task = None, None
            _warn(f"{host} is left out: qcli is not installed there ({why})")
            return self._refuse_if_alone(f"no machine of the cluster has qcli; {host}: {why}")
        key = worker.slot if task is None else (task.method, task.name)
        self._tried[key] += 1
        if self._tried[key] >= DEATHS:
            what = f"at {task.name}" if task else "before it began"
            raise ClusterError(
                f"workers died {DEATHS} times {what}, the last on {host}: {why}",
                "Finished work is kept. A worker that the system kills for memory needs fewer of them on a machine: --workers.",
            )
        alive = self.engine.nodes()
        if worker.node not in alive:
            if not alive:
                raise ClusterError(f"no machine of the cluster is left, the last was {host}", "Finished work is kept: rerun.")
            others = Counter(w.node.id for w in self.workers if w.actor is not None and w is not worker)
            worker.node = min(alive, key=lambda node: others[node.id])
            worker.threads = min(worker.threads, worker.node.cpus)
            worker.cpus = min(worker.cpus, worker.node.cpus)
            worker.gpus = min(worker.gpus, worker.node.gpus)
        _warn(f"a worker on {host} died ({why}); its work is done again on {worker.node.address}")
        self._start(worker)

    def _refuse_if_alone(self, message: str) -> None:
        if all(worker.actor is None for worker in self.workers):
            raise ClusterError(message, "Install the same qcli on every machine.")

    def _look(self) -> None:
        """Asks the workers how far they are, now and then."""
        now = time.monotonic()
        if now - self._looked < _POLL:
            return
        self._looked = now
        for worker in self.workers:
            if worker.task is not None and worker not in self._asked.values():
                self._asked[self.engine.call(worker.actor, "state")] = worker
        self._show()

    def _heard(self, call: Any) -> None:
        worker = self._asked.pop(call)
        try:
            number, done, doing = self.engine.result(call)
        except Died:
            return  # the call under way says so too
        if worker.task is not None and number == worker.number:
            worker.done, worker.doing = done, doing or worker.task.name

    def _show(self) -> None:
        now = time.monotonic()
        for worker in self.workers:
            worker.history.append((now, worker.finished + worker.done))
            while now - worker.history[0][0] > _RATE_SECONDS:
                worker.history.popleft()
        if self.bar is None:
            return
        working = [worker for worker in self.workers if worker.task is not None]
        usual = median([worker.rate for worker in working]) if len(working) > 1 else 0.0
        starting = [WorkerShown(w.host, 0.0, "starting", False) for w in self.workers if w.actor is not None and not w.ready]
        self.bar.workers([WorkerShown(w.host, w.rate, w.doing, 0 < w.rate < _SLOW * usual) for w in working] + starting)
        done = sum(worker.finished + worker.done for worker in self.workers)
        self.bar.advance(done - self._told, working[0].doing if working else "")
        self._told = done

    def summary(self) -> list[WorkerSummary]:
        """What each worker has done."""
        return [WorkerSummary(w.host, w.threads, w.tasks, w.finished, round(w.seconds, 3)) for w in self.workers if w.hello]


def _warn(message: str) -> None:
    warnings.warn(message, errors.QcliWarning, stacklevel=2)


def _error(failed: Failed, several: bool) -> QcliError:
    """The error that a worker met, as the one of this process."""
    kind = getattr(errors, failed.kind, QcliError)
    made = kind.__new__(kind)
    QcliError.__init__(made, f"on {failed.host}: {failed.message}" if several else failed.message, failed.hint)
    return made
