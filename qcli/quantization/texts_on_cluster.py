"""A calibration divided over the machines of a cluster: workers take segments of the texts through the blocks, and round weights.

The driver passes the blocks with a short text alone, decides factors, and writes. For each block it asks the workers for the
statistics of each segment, and adds these in their order. So the bytes are those of one machine's run, for any number of workers.
A worker keeps the hidden states of its segments between two blocks. One that takes the place of another passes the earlier blocks
again, without statistics.
"""

import queue
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qcli.calibration.gather import Crew, Gathered, Gatherer
from qcli.calibration.rounding import Changed
from qcli.calibration.statistics import Statistics, segment_of
from qcli.calibration.waiting import WaitingStates
from qcli.cluster.jobs import Told
from qcli.cluster.pool import Pool, Task
from qcli.methods.errors import ErrorSums
from qcli.quantization.on_cluster import ShardJob
from qcli.quantization.plan import Plan, Work
from qcli.quantization.rounding import Rounding, by_input, round_weight
from qcli.quantization.shard_files import Sink
from qcli.streaming.batches import Batch
from qcli.streaming.head import Head
from qcli.streaming.run import Call, Observer, Pass, run_calls
from qcli.streaming.skeleton import Skeleton
from qcli.streaming.units import Unit

Tensors = dict[str, torch.Tensor]
Pieces = list[tuple[str, int, bytes, int, int]]  # of Staging.write_rows: file, offset, data, row, stride; row 0 for Staging.write


@dataclass(frozen=True)
class Asked:
    """What is asked of a segment at a block: statistics of the inputs of `names`, with those of `hessians` and `samples` as
    Gatherer has them. `first` is the number of the segment's first batch, of `batches` in all. With `keep` the texts go on behind
    the block."""

    block: str
    segment: int
    first: int
    batches: int
    names: tuple[str, ...]
    hessians: Set[str]
    samples: Set[str]
    kept_tokens: int
    keep: bool


class TextsOnCluster:
    """The driver's side: the `batches` of the texts, by segments, on the workers that are ready. Raises what the pool raises."""

    def __init__(self, pool: Pool, plan: Plan, batches: Sequence[Batch], dtype: str):
        self.pool, self.plan, self.count = pool, plan, len(batches)
        slots = [worker.slot for worker in pool.meet()]
        of_segment: dict[int, list[Batch]] = {}
        for number, batch in enumerate(batches):
            of_segment.setdefault(segment_of(number, self.count), []).append(batch)
        self._firsts = {segment: sum(len(of_segment[s]) for s in range(segment)) for segment in of_segment}
        self._slots = {segment: slots[segment % len(slots)] for segment in of_segment}
        self._texts = {
            slot: pool.share((dtype, {s: of_segment[s] for s in of_segment if self._slots[s] == slot})) for slot in slots
        }

    def gather(
        self, block: str, names: Sequence[str], hessians: Set[str], samples: Set[str], kept_tokens: int, keep: bool
    ) -> Gathered:
        """The statistics of all texts at a block."""
        tasks = []
        for segment, slot in self._slots.items():
            asked = Asked(block, segment, self._firsts[segment], self.count, tuple(names), hessians, samples, kept_tokens, keep)
            name = f"{block}, texts {segment + 1} of {len(self._slots)}"
            tasks.append(Task("gather", (self._texts[slot], asked), 0, name, slot))
        waiting: dict[int, list[tuple[tuple[str, ...], Tensors]]] = {}
        found: dict[str, Statistics] = {}
        merged = 0
        for task, value in self.pool.deal(tasks):
            waiting[task.arguments[1].segment] = value
            while merged in waiting:
                _merge(waiting.pop(merged), found, first=not merged)
                merged += 1
        return Gathered(names, found)

    def round(
        self,
        works: Sequence[Work],
        statistics: Mapping[str, Statistics],
        absmax: Callable[[Work], float],
        changed: Mapping[str, Changed],
    ) -> Iterator[tuple[Work, "Collected", Rounding]]:
        """Rounds the weights of a block by the `statistics` of some modules: what is to be written of each, and what it cost."""
        bins: list[list[Work]] = [[] for _ in self.pool.meet()]
        for work in sorted(works, key=lambda work: -work.info.numel):
            min(bins, key=lambda each: sum(w.info.numel for w in each)).append(work)
        shared = {id(each): self.pool.share(each.tensors()) for each in statistics.values()}
        tasks = []
        for each in filter(None, bins):
            theirs = [statistics.get(work.module) for work in each]
            used = list(dict.fromkeys(id(its) for its in theirs if its is not None))
            orders = [
                Order(work.index, None if its is None else used.index(id(its)), absmax(work), changed.get(work.module))
                for work, its in zip(each, theirs)
            ]
            name = f"rounding {each[0].module}"
            tasks.append(Task("round", (orders, *(shared[key] for key in used)), sum(w.info.nbytes for w in each), name))
        for _, done in self.pool.deal(tasks):
            for index, collected, rounding in done:
                yield self.plan.work[index], collected, rounding


def _merge(groups: list[tuple[tuple[str, ...], Tensors]], found: dict[str, Statistics], first: bool) -> None:
    """Adds the statistics of a segment. Which modules share them is seen in the first one, as by one machine in its first batch."""
    merged: set[int] = set()
    for names, tensors in groups:
        if first:
            found |= dict.fromkeys(names, Statistics.of(tensors))
            continue
        for name in names:
            if name not in found:
                found[name] = Statistics.of({key: tensor.clone() for key, tensor in tensors.items()})
            elif id(found[name]) not in merged:
                found[name].merge(Statistics.of(tensors))
            merged.add(id(found[name]))


@dataclass(frozen=True)
class Order:
    """A weight to round: the index of its work, which of the statistics that come along are its own, and what round_weight takes
    besides."""

    work: int
    statistics: int | None
    absmax: float
    changed: Changed | None


class Collected:
    """A Sink: what a worker would write of a weight, for the driver to write."""

    def __init__(self) -> None:
        self.pieces: Pieces = []

    def write(self, file: str, offset: int, data: bytes | memoryview) -> None:
        """See Sink."""
        self.pieces.append((file, offset, bytes(data), 0, 0))

    def write_rows(self, file: str, offset: int, data: memoryview, row: int, stride: int) -> None:
        """See Sink."""
        self.pieces.append((file, offset, bytes(data), row, stride))

    def finish_work(self, index: int, errors: ErrorSums) -> None:
        """Does nothing: the driver notes it."""

    def write_to(self, files: Sink) -> None:
        """Writes it."""
        for file, offset, data, row, stride in self.pieces:
            if row:
                files.write_rows(file, offset, memoryview(data), row, stride)
            else:
                files.write(file, offset, data)


class QuantizationJob(ShardJob):
    """On a worker: also takes texts through the model, and rounds by what they leave."""

    _texts: "_Texts | None" = None

    def gather(self, told: Told, texts: tuple[str, dict[int, list[Batch]]], asked: Asked) -> list[tuple[tuple[str, ...], Tensors]]:
        """What `asked` says, by the modules that share statistics. `texts` are the model's dtype and the batches by segments."""
        if self._texts is None:
            self._texts = _Texts(self.plan, self.device, *texts)
        told.advance(0, f"{asked.block}, texts {asked.segment + 1}")
        return self._texts.ask(asked)

    def round(self, told: Told, orders: Sequence[Order], *statistics: Tensors) -> list[tuple[int, Collected, Rounding]]:
        """Rounds weights, as many at a time as there are threads."""
        made = [Statistics.of(tensors) for tensors in statistics]
        found = {self.plan.work[o.work].module: made[o.statistics] for o in orders if o.statistics is not None}
        by_work = {order.work: order for order in orders}
        works = by_input([self.plan.work[order.work] for order in orders], found)

        def one(order: Order) -> tuple[int, Collected, Rounding]:
            work, collected = self.plan.work[order.work], Collected()
            its = found.get(work.module)
            rounding = round_weight(self.plan, collected, work, its, self.device, order.absmax, order.changed)
            told.advance(work.info.nbytes, work.info.name)
            return order.work, collected, rounding

        with Crew(self.device) as crew:
            return list(crew.results([partial(one, by_work[work.index]) for work in works]))


class _Finished(Exception):
    """No block comes after this one."""


class _Texts(Observer):
    """The calls of a worker's texts, in a thread of their own, which waits at each block for what is asked of it."""

    def __init__(self, plan: Plan, device: torch.device, dtype: str, segments: dict[int, list[Batch]]):
        self.plan, self.device, self.dtype, self.segments = plan, device, dtype, segments
        self._threads = torch.get_num_threads()
        self._asked: queue.Queue[Asked] = queue.Queue()
        self._answers: queue.Queue[Any] = queue.Queue()
        self._next: Asked | None = None
        self._ended: BaseException | None = None
        threading.Thread(target=self._run, daemon=True).start()

    def ask(self, asked: Asked) -> list[tuple[tuple[str, ...], Tensors]]:
        """The answer, once the texts are there. Raises what stopped them."""
        if self._ended is None:
            self._asked.put(asked)
            answer = self._answers.get()
            if not isinstance(answer, BaseException):
                return answer  # type: ignore[no-any-return]
            self._ended = answer
        raise self._ended

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        plan, settings = self.plan, self.plan.calibration
        try:
            options: dict[str, Any] = {"revision": plan.source.revision} if plan.source.is_hub else {}
            trust, device = plan.source.trusted, self.device.type
            self.skeleton = Skeleton(plan.source.label, dtype=self.dtype, device=device, trust_remote_code=trust, **options)
            head = Head(self.skeleton)
            calls = [Call(head.below(batch), batch=batch) for batches in self.segments.values() for batch in batches]
            on_disk = settings is not None and settings.states_on_disk
            with tempfile.TemporaryDirectory(prefix="qcli-") as folder, Crew(self.device) as self._crew, head.stopping():
                with WaitingStates(Path(folder)) if on_disk else nullcontext() as self._states:
                    run_calls(self.skeleton, calls, self)
        except _Finished:
            pass
        except BaseException as e:
            self._answers.put(e)

    def through(self, unit: Unit) -> Callable[[Sequence[Pass]], Iterator[Any]] | None:
        """See Observer."""
        return (lambda passes: self._pass(unit, passes)) if unit.index is not None else None

    def _pass(self, unit: Unit, passes: Sequence[Pass]) -> Iterator[Any]:
        outputs: dict[int, Any] = {}
        left = len(self.segments)
        while True:
            asked = self._next = self._next or self._asked.get()
            if asked.block != unit.name:
                break
            self._next, left = None, left - 1
            first = sum(len(batches) for segment, batches in self.segments.items() if segment < asked.segment)
            theirs = range(first, first + len(self.segments[asked.segment]))
            self._answers.put(self._gather(asked, [passes[i] for i in theirs], theirs, outputs))
            if not asked.keep and not left:
                raise _Finished
        rest = [i for i in range(len(passes)) if i not in outputs]
        outputs |= zip(rest, self._crew.results([partial(self._one, passes[i], i) for i in rest]))
        for i in range(len(passes)):
            yield outputs.pop(i)

    def _one(self, each: Pass, number: int) -> Any:
        return self._kept(number, each.run())

    def _kept(self, number: int, output: Any) -> Any:
        return output if self._states is None else self._states.keep(number, output)

    def _gather(
        self, asked: Asked, passes: Sequence[Pass], numbers: range, outputs: dict[int, Any]
    ) -> list[tuple[tuple[str, ...], Tensors]]:
        modules = {name: self.skeleton.model.get_submodule(name) for name in asked.names}
        gatherer = Gatherer(
            modules,
            asked.hessians,
            self.device,
            asked.kept_tokens,
            asked.samples,
            asked.keep,
            first=asked.first,
            batches=asked.batches,
        )
        try:
            keep = (lambda number, output: self._kept(numbers[number], output)) if asked.keep else None
            made = self._crew.gather(passes, gatherer, keep)
        finally:
            gatherer.close()
        if asked.keep:
            outputs |= zip(numbers, made)
        for statistics in {id(each): each for each in gatherer.found.values()}.values():
            if statistics.hessian is not None:
                statistics.symmetric()
        return [(group, {k: t.cpu() for k, t in gatherer.found[group[0]].tensors().items()}) for group in gatherer.groups]
