"""An inspection divided over the machines of a cluster: each worker passes some of the text through the whole model.

A worker gives back what its windows left at every block. The driver adds that up, in the order in which workers end, and then
finds what needs the whole text: the features, the dims with histograms, what is ablated. Windows that one machine reads in one call
stay together, and sums do not depend on the order of calls, so that each figure is what it is on one machine.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

from qcli.cluster.engine import Engine
from qcli.cluster.jobs import Told
from qcli.cluster.pool import Pool, Task
from qcli.evaluation.on_cluster import everywhere
from qcli.evaluation.tokens import TokenScores
from qcli.outliers.ablation import Zeroed, Zeroing, ablate
from qcli.outliers.measure import Asked, measure
from qcli.outliers.measured import Measured
from qcli.outliers.passes import Opening, Passes, check_room
from qcli.progress import Bar, NoBar
from qcli.streaming.corpus import Window
from qcli.streaming.dividing import divided
from qcli.streaming.reading import Reading
from qcli.streaming.skeleton import Skeleton

JOB = f"{__name__}:InspectionJob"


class InspectionJob:
    """On a worker: passes some windows of a text, by their `numbers`, through the model."""

    def __init__(self, opening: Opening):
        self.opening, self.skeleton = opening, opening.skeleton()

    @cached_property
    def eager(self) -> Skeleton:
        """The model of the second pass."""
        return self.opening.eager()

    def check_room(self, told: Told, text: Sequence[Window], numbers: Sequence[int], variants: int, workers: int) -> None:
        """See qcli.outliers.passes."""
        check_room(self.skeleton, [text[i] for i in numbers], variants, text, workers)

    def measure(self, told: Told, text: Sequence[Window], numbers: Sequence[int], asked: Asked) -> tuple[Measured, TokenScores]:
        """See qcli.outliers.measure."""
        return measure(self.skeleton, [text[i] for i in numbers], numbers, asked, told.advance, whole=False)

    def ablate(self, told: Told, text: Sequence[Window], numbers: Sequence[int], zeroing: Zeroing) -> Zeroed:
        """See qcli.outliers.ablation."""
        return ablate(self.eager, [text[i] for i in numbers], zeroing, told.advance)


class DividedPasses:
    """What Passes does, by the workers of a pool of InspectionJobs. Raises what it raises, and ClusterError."""

    def __init__(self, pool: Pool, skeleton: Skeleton, windows: Sequence[Window]):
        self._pool, self._windows, workers = pool, windows, pool.meet()
        parts = divided(windows, [worker.threads for worker in workers])
        self._parts = {worker.slot: part for worker, part in zip(workers, parts) if part}
        on_node = Counter(worker.node.id for worker in workers if worker.slot in self._parts)
        self._beside = {worker.slot: on_node[worker.node.id] for worker in workers}
        self._text = pool.share(tuple(windows))
        self._each = Reading.work(skeleton)
        self.work = self._each * len(self._parts)
        self.bar: Bar = NoBar()

    def check_room(self, variants: int) -> None:
        """See Passes. Each worker has its share of the windows, and of its machine's memory."""
        for _ in self._deal("check_room", {slot: (variants, self._beside[slot]) for slot in self._parts}, 0):
            pass

    def measure(self, asked: Asked) -> tuple[Measured, TokenScores]:
        """See Passes."""
        whole: Measured | None = None
        scores = []
        for part, (found, scored) in self._deal("measure", dict.fromkeys(self._parts, (asked,)), self._each):
            scores.append((part, scored))
            if whole is None:
                whole = found
            else:
                whole.merge(found)
        assert whole is not None
        whole.settle()
        return whole, self._placed(scores)

    def ablate(self, zeroing: Zeroing) -> Zeroed:
        """See Passes."""
        found = list(self._deal("ablate", dict.fromkeys(self._parts, (zeroing,)), self._each))
        whole = found[0][1]
        for _, zeroed in found[1:]:
            whole.merge(zeroed)
        whole.scores = {name: self._placed([(part, zeroed.scores[name]) for part, zeroed in found]) for name in whole.scores}
        return whole

    def _deal(self, method: str, arguments: dict[int, tuple[Any, ...]], size: int) -> Iterator[tuple[list[int], Any]]:
        """The numbers of the windows of each part, and what the method of its worker returned, as they end."""
        self._pool.bar = self.bar
        tasks = [
            Task(method, (self._text, part, *arguments[slot]), size, f"{len(part):,} windows, {n}", slot)
            for n, (slot, part) in enumerate(self._parts.items(), 1)
        ]
        return ((task.arguments[1], value) for task, value in self._pool.deal(tasks))

    def _placed(self, found: Sequence[tuple[list[int], TokenScores]]) -> TokenScores:
        return TokenScores.placed(found, [window.scored for window in self._windows])


@contextmanager
def passes(
    address: str | None, workers: int | None, opening: Opening, skeleton: Skeleton, windows: Sequence[Window]
) -> Iterator[Passes | DividedPasses]:
    """The passes of `windows`, by so many workers of the cluster at `address`; on this machine without an address. `skeleton` is
    what `opening` opens."""
    if address is None:
        yield Passes(opening, skeleton, windows)
        return
    spec = replace(opening, model=everywhere(opening.model), revision=skeleton.source.revision)
    with Engine(address) as engine, Pool(engine, JOB, spec, workers, gpus=opening.device != "cpu") as pool:
        yield DividedPasses(pool, skeleton, windows)
