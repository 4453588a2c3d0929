"""The calibration pass: texts go through the model block by block, and each block is quantized as they reach it.

The texts go through a block as it was, and leave their statistics at the inputs of its linear modules. Where a method divides
inputs by factors, these are decided, and what makes the inputs is written with them folded in. The weights are then rounded and
written. In the order "parallel" what the block gave is what the next one sees. In the order "sequential" the texts go through the
block again, with the weights that were written, so that the next one sees what it will see when the quantized model runs. Memory
holds one block, its statistics and the hidden states of all tokens.

A module's weight is a unit of the journal. After a stop, blocks whose weights are all there are passed with these, and not rounded
again. Nothing here depends on the number of threads: see qcli.calibration.gather.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qcli.calibration.gather import Crew, Gathered, Gatherer
from qcli.calibration.rounding import Changed
from qcli.calibration.settings import FEWEST_TOKENS, PARALLEL
from qcli.calibration.statistics import Statistics
from qcli.calibration.stored import StatisticsWriter, StoredStatistics
from qcli.calibration.token_weights import TokenWeights
from qcli.calibration.waiting import WaitingStates
from qcli.cluster.pool import Pool
from qcli.errors import NonFiniteError
from qcli.methods.choosing import needs_of
from qcli.progress import Advance
from qcli.quantization.absmax import AbsmaxReader
from qcli.quantization.calibration_needs import stated_by
from qcli.quantization.gradient_needs import fisher_works
from qcli.quantization.plan import Plan, Work
from qcli.quantization.rounding import Rounding, by_input, round_weight
from qcli.quantization.staged import StagedWeights
from qcli.quantization.staging import Staging
from qcli.quantization.texts_on_cluster import TextsOnCluster
from qcli.quantization.transforming import SAMPLE_TOKENS, Folded, Transforms, changes_inputs
from qcli.streaming.batches import make_batches
from qcli.streaming.corpus import Window
from qcli.streaming.head import Head
from qcli.streaming.run import Call, Observer, Pass, run_calls
from qcli.streaming.skeleton import Skeleton
from qcli.streaming.units import Unit

TRIAL_TOKENS = 128  # on which folds are tried


@dataclass
class Calibrated:
    """What the pass did. `roundings` by module, `unseen` the modules that too few tokens reached, with how many. `folded` says what
    inputs were divided by, and `token_weights` what tokens count, for methods that weigh them."""

    tokens: int = 0
    roundings: dict[str, Rounding] = field(default_factory=dict)
    unseen: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"statistics": 0.0, "rounding": 0.0})
    folded: Folded = field(default_factory=Folded)
    token_weights: TokenWeights | None = None

    def spent(self, what: str, seconds: float) -> None:
        """Adds to what a part of the pass took."""
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds


def calibrate(
    plan: Plan,
    staging: Staging,
    skeleton: Skeleton,
    windows: Sequence[Window],
    advance: Advance,
    found: Calibrated | None = None,
    pool: Pool | None = None,
) -> Calibrated:
    """Rounds every module of the plan that needs statistics of its inputs and lies in a block that the texts reach. What it leaves
    is left to `execute`. `advance` hears of source bytes as they are finished. `found` is what was done before, to which it adds.
    With a `pool` its workers take the texts through the blocks, and round.

    Raises NonFiniteError where an activation is NaN or infinite, CheckpointError for what fails on disk.
    """
    staging.open_shards()
    found = found or Calibrated(tokens=sum(len(window.ids) for window in windows))
    with Crew(skeleton.device) as crew:
        texts = make_batches([window.ids for window in windows], None)  # not padded: statistics are of tokens of the text alone
        dtype = str(skeleton.dtype).removeprefix("torch.")
        elsewhere = TextsOnCluster(pool, plan, texts, dtype) if pool else None
        blocks = _Blocks(plan, staging, skeleton, crew, found, advance, elsewhere)
        if not blocks.last:
            return found
        head = Head(skeleton)
        batches = [] if blocks.stored or pool else texts
        if blocks.trial:
            batches = make_batches([windows[0].ids[:TRIAL_TOKENS]], None) + batches
        calls = [Call(head.below(batch), batch=batch) for batch in batches]
        with blocks.saving(), blocks.waiting():
            try:
                with head.stopping():
                    run_calls(skeleton, calls, blocks)
            except _Finished:
                for unit in skeleton.blocks:
                    skeleton.unload(unit)  # its weights are the rounded ones
    staging.sync()
    return found


class _Finished(Exception):
    """Nothing is left to be rounded in any later block."""


class _Blocks(Observer):
    """`last` is the name of the last block in which something is left to do; it is empty where none is. What gradients decide is
    written already. With `trial` the first call is a short one, which is in no statistic: on it folds are tried. `stored` are
    statistics that are read and not gathered; those of `elsewhere` are gathered by others. That call alone passes the blocks then.
    """

    def __init__(
        self,
        plan: Plan,
        staging: Staging,
        skeleton: Skeleton,
        crew: Crew,
        found: Calibrated,
        advance: Callable[[int, str], None],
        elsewhere: TextsOnCluster | None,
    ):
        self.plan, self.staging, self.skeleton = plan, staging, skeleton
        self.crew, self.found, self.advance, self.elsewhere = crew, found, advance, elsewhere
        self.staged = StagedWeights(plan, staging)
        self.absmax = AbsmaxReader(plan)
        self.transforms = Transforms(plan, staging, skeleton, crew)
        found.folded = self.transforms.found
        self.locked = threading.Lock()
        self.works = self._of_blocks([work for work in plan.calibrated if work.method and needs_of(work.method) != "fisher"])
        self.by_gradients = self._of_blocks(fisher_works(plan))
        self.watched: dict[str, list[Work]] = {}  # all whose statistics are saved
        self.stored: StoredStatistics | None = None
        self._writer: StatisticsWriter | None = None
        self._states: WaitingStates | None = None
        settings = plan.calibration
        assert settings is not None
        self.parallel = settings.order == PARALLEL
        if settings.save_statistics:
            self.watched = self._of_blocks(plan.quantized)
            self._writer = StatisticsWriter(
                Path(settings.save_statistics), stated_by(plan, str(skeleton.dtype)), len(plan.quantized)
            )
        if settings.statistics:
            self.stored = StoredStatistics(Path(settings.statistics))
            self.stored.check(stated_by(plan, str(skeleton.dtype)))
        self.last = next((u.name for u in reversed(skeleton.blocks) if self._left(u) or self.watched.get(u.name)), "")
        self.trial = bool(self.stored or elsewhere) or any(changes_inputs(work) for works in self.works.values() for work in works)

    def _of_blocks(self, works: Sequence[Work]) -> dict[str, list[Work]]:
        found: dict[str, list[Work]] = {unit.name: [] for unit in self.skeleton.blocks}
        for work in works:
            unit = next((u for u in self.skeleton.blocks if work.linear and work.linear.module.startswith(f"{u.name}.")), None)
            if unit is not None:
                found[unit.name].append(work)
        return found

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While this lasts, hidden states wait on the disk if the plan says so."""
        settings = self.plan.calibration
        if settings is None or not settings.states_on_disk:
            yield
            return
        with WaitingStates(self.staging.state) as self._states, self._states.of_embedding(self.skeleton.embedding.module):
            yield

    def _kept(self, number: int, output: Any) -> Any:
        """What a block gave the call of this number, where it waits for the next block."""
        return output if self._states is None else self._states.keep(number, output)

    def _run(self, passes: Sequence[Pass]) -> Iterator[Any]:
        """What the passes give, of which the first is that of the first call."""

        def run(number: int) -> Any:
            return self._kept(number, passes[number].run())

        return self.crew.results([partial(run, number) for number in range(len(passes))])

    def saving(self) -> AbstractContextManager[Any]:
        """While this lasts, the file of statistics that is asked for is written."""
        return self._writer or nullcontext()

    def _left(self, unit: Unit) -> list[Work]:
        return [work for work in self.works[unit.name] if work.index not in self.staging.done]

    def through(self, unit: Unit) -> Callable[[Sequence[Pass]], Iterator[Any]] | None:
        """See Observer."""
        return (lambda passes: self._pass(unit, passes)) if unit.index is not None else None

    def _pass(self, unit: Unit, passes: Sequence[Pass]) -> Iterator[Any]:
        works, left, kept = self.works[unit.name], self._left(unit), None
        if left or self.watched.get(unit.name):
            kept = self._round(unit, passes, left, keep=self.parallel and unit.name != self.last)
        if unit.name == self.last:
            raise _Finished
        if self.parallel:
            yield from kept or self._run(passes)
            return
        started = time.monotonic()
        self._replace(unit, works)
        outputs = self._run(passes)
        for _ in passes:
            output = next(outputs)
            self.found.spent("quantized block", time.monotonic() - started)
            yield output
            started = time.monotonic()

    def _round(self, unit: Unit, passes: Sequence[Pass], works: Sequence[Work], keep: bool) -> list[Any]:
        """Rounds the weights of a block. What its passes gave, if that is to be kept."""
        started = time.monotonic()
        transforming = any(changes_inputs(work) for work in self.works[unit.name])
        # Factors are decided again by all that decided them, and tokens weighed by all that weighed them.
        seen = self.works[unit.name] if transforming or self.found.token_weights else works
        outputs, gathered = self._gather(unit, passes, seen, keep)
        self.found.spent("statistics", time.monotonic() - started)
        started = time.monotonic()
        for statistics in {id(each): each for each in gathered.found.values()}.values():
            if not statistics.is_finite:
                name = next(name for name, its in gathered.found.items() if its is statistics)
                raise NonFiniteError(f"{name}: an activation that reaches it is NaN or infinite", "Try --dtype float32.")
            if statistics.hessian is not None:
                statistics.symmetric()
        if self._writer:
            self._writer.add(gathered)
            wanted = [work.linear.module for work in seen if work.linear]
            gathered = Gathered(wanted, {name: gathered.found[name] for name in wanted if name in gathered.found})
        changed: dict[str, Changed] = {}
        if transforming and works:
            decided = self.transforms.decide(unit, passes[0], gathered, seen, self._fewest)
            self.transforms.write(decided)
            changed = decided.changed
            self.found.spent("factors", time.monotonic() - started)
            started = time.monotonic()
        if self.elsewhere:
            self._round_elsewhere(self.elsewhere, works, gathered, changed)
        else:
            tasks = [partial(self._round_one, work, gathered, changed) for work in by_input(works, gathered.found)]
            for _ in self.crew.results(tasks):
                pass
        if self.found.token_weights:
            self.found.token_weights.forget([work.linear.module for work in seen if work.linear])
        self.staging.sync()
        self.found.spent("rounding", time.monotonic() - started)
        return outputs

    def _gather(self, unit: Unit, passes: Sequence[Pass], seen: Sequence[Work], keep: bool) -> tuple[list[Any], Gathered]:
        """What the passes of a block gave, if that is to be kept, and the statistics of the modules of `seen`, and of all that are
        watched."""
        trial, passes = passes[:1] if self.trial else (), passes[1:] if self.trial else passes
        outputs = list(self._run(trial if keep else ()))
        if self.stored:
            sizes = {work.linear.module: work.linear.in_features for work in seen if work.linear}
            return outputs, self.stored.gathered(sizes, self.skeleton.device)
        saved = self.watched.get(unit.name, [])
        names = [work.linear.module for work in saved or seen if work.linear]
        needs = {w.linear.module: needs_of(w.method) for w in seen if w.linear and w.method}
        hessians, samples = ({n for n in names if saved or needs.get(n) == wanted} for wanted in ("hessian", "tokens"))
        kept = bool(saved or samples) or any(changes_inputs(work) for work in seen)
        count = self.elsewhere.count if self.elsewhere else len(passes)
        kept_tokens = -(-SAMPLE_TOKENS // count) if kept else 0
        if self.elsewhere:
            go_on = self.parallel and unit.name != self.last
            return outputs, self.elsewhere.gather(unit.name, names, hessians, samples, kept_tokens, go_on)
        modules = {name: self.skeleton.model.get_submodule(name) for name in names}
        weights = self.found.token_weights
        gatherer = Gatherer(modules, hessians, self.skeleton.device, kept_tokens, samples, keep, weights, batches=len(passes))
        try:
            kept_as = (lambda number, output: self._kept(len(trial) + number, output)) if keep else None
            return outputs + self.crew.gather(passes, gatherer, kept_as), gatherer
        finally:
            gatherer.close()

    @property
    def _fewest(self) -> int:
        return min(FEWEST_TOKENS, self.found.tokens)

    def _statistics_of(self, work: Work, gathered: Gathered) -> Statistics | None:
        """The statistics that decide how a weight is rounded; None where too few tokens reached its module."""
        module = work.module
        statistics = gathered.found.get(module)
        if (tokens := statistics.tokens if statistics else 0) >= self._fewest:
            return statistics
        with self.locked:
            self.found.unseen[module] = tokens
        return None

    def _round_one(self, work: Work, gathered: Gathered, changed: Mapping[str, Changed]) -> None:
        module, statistics = work.module, self._statistics_of(work, gathered)
        device, absmax = self.skeleton.device, self.absmax.of(work)
        rounding = round_weight(self.plan, self.staging, work, statistics, device, absmax, changed.get(module))
        with self.locked:
            self.found.roundings[module] = rounding
        self.advance(work.info.nbytes, work.info.name)

    def _round_elsewhere(
        self, elsewhere: TextsOnCluster, works: Sequence[Work], gathered: Gathered, changed: Mapping[str, Changed]
    ) -> None:
        used = {work.module: its for work in works if (its := self._statistics_of(work, gathered)) is not None}
        for work, collected, rounding in elsewhere.round(works, used, self.absmax.of, changed):
            collected.write_to(self.staging)
            self.staging.finish_work(work.index, rounding.errors)
            self.found.roundings[work.module] = rounding

    def _replace(self, unit: Unit, works: Sequence[Work]) -> None:
        """Puts what was written in the place of the block's own."""
        if any(changes_inputs(work) for work in works):
            self.transforms.replace(unit)
        for work in (*works, *self.by_gradients[unit.name]):
            assert work.linear is not None
            module = self.skeleton.model.get_submodule(work.linear.module)
            weight = self.staged.weight(work)
            module.weight.data.copy_(weight.t() if work.linear.transposed else weight)
