"""Who works on what, and what happens when workers die. Without Ray: workers are objects, and calls are made one at a time."""

import os

import pytest
import torch

from qcli.cluster import installed, pool
from qcli.cluster.engine import Died, Node
from qcli.cluster.jobs import Hello, Host
from qcli.cluster.pool import DEATHS, Pool, Task
from qcli.errors import CheckpointError, ClusterError, NonFiniteError, PlanError, QcliWarning

CPUS = torch.get_num_threads()
NODES = [Node("a", "10.0.0.1", CPUS, 0), Node("b", "10.0.0.2", CPUS, 0)]


class Adding:
    """A job that knows a number, and in which call it is."""

    def __init__(self, spec):
        if spec == "missing":
            raise CheckpointError("there is no folder", "Make one.")
        self.number, self.calls = spec, 0

    def add(self, told, value):
        told.advance(value, f"adding {value}")
        self.calls += 1
        return self.number + value, self.calls

    def fail(self, told):
        raise NonFiniteError("a weight holds NaN", "Mend it.")

    def problems(self, told):
        raise PlanError("a model", ["one", "two"], "Mend both.")

    def fault(self, told):
        raise ZeroDivisionError("of our own")


class Engine:
    """`dies(node, method, arguments)` says whether a worker dies in a call; `gone` are nodes that are no more."""

    def __init__(self, nodes=NODES, dies=lambda node, method, arguments: False, hello=None):
        self._nodes, self.dies, self.hello = list(nodes), dies, hello or {}
        self.pending, self.done, self.stopped, self.started = [], {}, [], []

    def nodes(self):
        return self._nodes

    def start(self, kind, node, threads, cpus, gpus):
        self.started.append((node.id, threads, cpus))
        return node, Host(kind, threads)

    def call(self, worker, method, *arguments):
        call = object()
        self.pending.append((call, worker, method, arguments))
        return call

    def share(self, value):
        return value

    def wait(self, calls, seconds):
        """The first call that has ended; of a worker that dies all of them at once."""
        while self.pending:
            call, worker, method, arguments = self.pending.pop(0)
            if call in calls:
                self.done[call] = self._outcome(worker, method, arguments)
                ended = [call]
                for other, its, *_ in self.pending if isinstance(self.done[call], Died) else ():
                    if its is worker and other in calls:
                        self.done[other] = self.done[call]
                        ended.append(other)
                return ended
        return []

    def _outcome(self, worker, method, arguments):
        node, host = worker
        if node not in self._nodes or self.dies(node, method, arguments):
            return Died("the system killed it")
        if method == "hello":
            return Hello(f"host-{node.id}", os.getpid(), self.hello.get(node.id, installed.fingerprint()))
        try:
            return getattr(host, method)(*arguments)
        except Exception as e:
            return e

    def result(self, call):
        if isinstance(value := self.done.pop(call), Exception):
            raise value
        return value

    def stop(self, worker):
        self.stopped.append(worker)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(pool, "_POLL", 0.0)


def adding(engine, workers=None, spec=100, bar=None):
    return Pool(engine, f"{__name__}:Adding", spec, workers, bar=bar)


def tasks(*values, slot=None):
    return [Task("add", (value,), value, f"task {value}", slot) for value in values]


def test_one_worker_a_machine_and_each_task_once():
    engine = Engine()
    with adding(engine) as workers:
        found = {task.arguments[0]: value[0] for task, value in workers.deal(tasks(*range(9)))}
    assert found == {value: 100 + value for value in range(9)}
    assert [start[0] for start in engine.started] == ["a", "b"] and len(engine.stopped) == 2
    summary = workers.summary()
    assert sum(each.bytes for each in summary) == 36 and sum(each.tasks for each in summary) == 9
    assert all(each.tasks for each in summary)


@pytest.mark.parametrize("workers, expected", [(1, {"a": 1}), (3, {"a": 2, "b": 1}), (8, {"a": 4, "b": 4})])
def test_the_workers_of_a_machine_share_its_cpus(workers, expected):
    engine = Engine([Node("a", "x", 6, 0), Node("b", "y", 6, 0)])
    with adding(engine, workers):
        pass
    assert {node: sum(start[0] == node for start in engine.started) for node in expected} == expected
    for node, threads, cpus in engine.started:
        assert threads == max(6 // expected[node], 1) and cpus * expected[node] <= 6


def test_the_task_of_a_worker_that_dies_is_done_again():
    deaths = iter([True, False])
    engine = Engine(dies=lambda node, method, arguments: method == "call" and arguments[-1] == 3 and next(deaths))
    with pytest.warns(QcliWarning, match="a worker on host-. died .the system killed it."), adding(engine) as workers:
        found = {task.arguments[0]: value[0] for task, value in workers.deal(tasks(1, 2, 3, 4))}
    assert found == {1: 101, 2: 102, 3: 103, 4: 104} and workers.deaths == 1 and len(engine.started) == 3


def test_a_task_at_which_workers_die_is_given_up():
    engine = Engine(dies=lambda node, method, arguments: method == "call" and arguments[-1] == 3)
    with pytest.warns(QcliWarning), pytest.raises(ClusterError, match=f"died {DEATHS} times at task 3"), adding(engine) as workers:
        list(workers.deal(tasks(1, 3, 2)))


def test_workers_that_never_begin_are_given_up():
    with pytest.warns(QcliWarning), pytest.raises(ClusterError, match="before it began"):
        adding(Engine(dies=lambda node, method, arguments: method == "begin")).meet()


def test_another_machine_takes_the_place_of_one_that_is_gone():
    engine = Engine()

    def dies(node, method, arguments):
        if node.id == "b" and method == "call":
            engine._nodes = NODES[:1]
        return node not in engine._nodes

    engine.dies = dies
    with pytest.warns(QcliWarning, match="done again on 10.0.0.1"), adding(engine) as workers:
        assert sorted(value[0] for _, value in workers.deal(tasks(1, 2, 3))) == [101, 102, 103]
        assert {worker.node.id for worker in workers.workers} == {"a"}


def test_no_machine_is_left():
    engine = Engine()

    def dies(node, method, arguments):
        engine._nodes = [] if method == "call" else engine._nodes
        return method == "call"

    engine.dies = dies
    with pytest.raises(ClusterError, match="no machine of the cluster is left"), adding(engine) as workers:
        list(workers.deal(tasks(1)))
    with pytest.raises(ClusterError, match="no machine of the cluster has a free CPU"):
        adding(Engine([]))


def test_a_slot_keeps_its_worker_until_that_dies():
    died = []

    def dies(node, method, arguments):
        if method == "call" and arguments[-1] == 7 and not died:
            died.append(node)
            return True

    engine = Engine(dies=dies)
    wanted = [*tasks(1, 2, 3, slot=0), *tasks(6, 7, 8, slot=1)]
    with pytest.warns(QcliWarning), adding(engine) as workers:
        found = {task.arguments[0]: value[1] for task, value in workers.deal(wanted)}
    assert [found[n] for n in (1, 2, 3)] == [1, 2, 3]  # the calls of one job
    assert [found[n] for n in (6, 7, 8)] == [1, 1, 2]  # another job took over


def test_another_qcli_is_left_out_by_name():
    other = installed.fingerprint() | {"qcli": "0.0.7"}
    engine = Engine(hello={"b": other})
    with pytest.warns(QcliWarning, match="host-b is left out: it has qcli 0.0.7, and here it is"), adding(engine) as workers:
        assert [worker.node.id for worker in workers.meet()] == ["a"]
        assert len(list(workers.deal(tasks(1, 2)))) == 2
    sources = installed.fingerprint() | {"sources": "0"}
    with pytest.warns(QcliWarning), pytest.raises(ClusterError, match="no machine has the qcli of this one"):
        adding(Engine(hello={"a": sources, "b": sources})).meet()


def test_a_slot_that_no_machine_can_take_ends_the_run():
    """Its machine is gone, and the only other one has another qcli."""
    engine = Engine([NODES[0]])

    def dies(node, method, arguments):
        if method == "call" and node.id == "a":
            engine._nodes = [NODES[1]]
        return node not in engine._nodes

    engine.dies, engine.hello = dies, {"b": installed.fingerprint() | {"qcli": "0.0.7"}}
    with pytest.warns(QcliWarning), pytest.raises(ClusterError, match="no machine"), adding(engine) as workers:
        list(workers.deal(tasks(1, slot=0)))
    engine = Engine(NODES)

    def dies_too(node, method, arguments):
        if method == "call" and node.id == "b":
            engine._nodes = [NODES[0]]
            engine.hello = {"a": installed.fingerprint() | {"qcli": "0.0.7"}}
        return node not in engine._nodes

    engine.dies = dies_too
    with pytest.warns(QcliWarning), pytest.raises(ClusterError, match="take the place of"), adding(engine) as workers:
        list(workers.deal(tasks(1, slot=1)))


def test_the_fingerprint_says_what_results_depend_on():
    ours = installed.fingerprint()
    assert ours["torch"] == torch.__version__ and installed.difference(ours, dict(ours)) is None
    assert "torch 1.0" in installed.difference(ours, ours | {"torch": "1.0"})
    assert "other sources" in installed.difference(ours, ours | {"sources": "0"})


@pytest.mark.parametrize(
    "method, kind, message", [("fail", NonFiniteError, "on .*: a weight holds NaN"), ("problems", PlanError, "2 problems")]
)
def test_errors_for_users_come_through_as_they_are(method, kind, message):
    with pytest.raises(kind, match=message) as caught, adding(Engine()) as workers:
        list(workers.deal([Task(method, (), 0, "x")]))
    assert caught.value.hint.startswith("Mend")


def test_faults_of_our_own_come_through_too():
    with pytest.raises(ZeroDivisionError), adding(Engine()) as workers:
        list(workers.deal([Task("fault", (), 0, "x")]))


def test_a_job_that_cannot_be_made_says_why():
    with pytest.raises(CheckpointError, match="there is no folder"):
        adding(Engine(), spec="missing").meet()


def test_those_who_are_ready_begin_without_those_who_wait(monkeypatch):
    monkeypatch.setattr(pool, "PATIENCE", 0.02)
    engine = Engine()
    call = engine.call
    engine.call = lambda worker, method, *arguments: object() if worker[0].id == "b" else call(worker, method, *arguments)
    with pytest.warns(QcliWarning, match="begins without 1 of 2 workers: others hold the CPUs of"), adding(engine) as workers:
        assert [worker.node.id for worker in workers.meet()] == ["a"]
        assert len(list(workers.deal(tasks(1, 2)))) == 2


class Bar:
    def __init__(self):
        self.done, self.shown = 0, []

    def advance(self, count, name):
        self.done += count

    def workers(self, found):
        self.shown.append(found)


def test_progress_adds_up_also_when_a_worker_dies(monkeypatch):
    bar, deaths = Bar(), iter([True, False])
    engine = Engine(dies=lambda node, method, arguments: method == "call" and arguments[-1] == 30 and next(deaths))
    with pytest.warns(QcliWarning), adding(engine, bar=bar) as workers:
        list(workers.deal(tasks(10, 20, 30)))
    assert bar.done == 60 and bar.shown


def test_the_slow_are_those_below_half_of_the_median():
    bar = Bar()
    with adding(Engine([Node(n, n, CPUS, 0) for n in "abc"]), bar=bar) as workers:
        for worker, rate in zip(workers.workers, (100, 90, 30)):
            worker.task, worker.history = tasks(1)[0], pool.deque([(0.0, 0), (1.0, rate)])
            worker.finished, worker.ready = rate, True
        pool.time, clock = type("clock", (), {"monotonic": staticmethod(lambda: 1.0)}), pool.time
        try:
            workers._show()
        finally:
            pool.time = clock
    assert [each.slow for each in bar.shown[-1]] == [False, False, True]
