"""The pass of methods that need gradients: texts go forward through the model as it was, and the gradients of their loss come back
through it block by block, the last block first. Of methods that need Fisher information each block is rounded as they have left it.
For those that weigh tokens a number for each token and module is kept.

So Fisher information is never stored: that of one block is in memory, as large as its weights in float32. After a stop, the texts
go forward again, and gradients pass finished blocks without anything being summed. They end at the first block in which a weight is
left.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

from torch import nn

from qcli.calibration.backward import Backward
from qcli.calibration.fisher import Fisher, FisherGatherer
from qcli.calibration.gather import Crew
from qcli.calibration.settings import FEWEST_TOKENS
from qcli.calibration.token_weights import TokenWeights
from qcli.calibration.waiting import WaitingStates
from qcli.errors import NonFiniteError
from qcli.progress import Advance
from qcli.quantization.calibrating import Calibrated
from qcli.quantization.gradient_needs import fisher_works, weighing_works
from qcli.quantization.plan import Plan, Work
from qcli.quantization.rounding import round_by_fisher
from qcli.quantization.staging import Staging
from qcli.streaming.corpus import Window
from qcli.streaming.skeleton import Skeleton
from qcli.streaming.units import Unit


def round_by_gradients(plan: Plan, staging: Staging, skeleton: Skeleton, windows: Sequence[Window], advance: Advance) -> Calibrated:
    """Rounds every module of the plan whose method needs Fisher information and which lies in a block that the texts reach. For
    modules that `calibrate` rounds, and whose methods weigh tokens, it finds out what these count. `advance` hears of source bytes
    as they are finished.

    Raises NonFiniteError where a gradient is NaN or infinite, CheckpointError for what fails on disk.
    """
    found = Calibrated(tokens=sum(len(window.ids) for window in windows))
    left = {work.linear.module: work for work in fisher_works(plan) if work.linear and work.index not in staging.done}
    weighing = {work.linear.module: work for work in weighing_works(plan) if work.linear}
    # Modules that read one input are weighed together, so all of a block, unless all are written.
    blocks = [_within(unit, weighing) for unit in skeleton.blocks]
    written = [all(work.index in staging.done for work in works.values()) for works in blocks]
    later = {name: work for works, done in zip(blocks, written) if not done for name, work in works.items()}
    if not any(_within(unit, left | later) for unit in skeleton.blocks):
        return found
    staging.open_shards()
    started = time.monotonic()
    on_disk = plan.calibration is not None and plan.calibration.states_on_disk
    with Crew(skeleton.device) as crew, WaitingStates(staging.state) if on_disk else nullcontext() as states:
        backward = Backward(skeleton, windows, crew, states)
        backward.through_head()
        found.seconds["gradients"] = time.monotonic() - started
        found.token_weights = weights = TokenWeights() if later else None
        gathered: dict[str, FisherGatherer] = {}
        while any(_within(entered.unit, left | later) for entered in backward.entered):
            entered = backward.entered.pop()
            started, unit, works = time.monotonic(), entered.unit, _within(entered.unit, left)
            gatherer = gathered.setdefault(unit.name, FisherGatherer(skeleton.device))
            skeleton.load(unit)
            with gatherer.listening(_modules(skeleton, works)):
                if weights is None:
                    backward.through(entered, gatherer.batch)
                else:
                    with weights.listening(_modules(skeleton, _within(unit, later))):
                        backward.through(entered, partial(_both, gatherer, weights))
            skeleton.unload(unit)
            found.seconds["gradients"] += time.monotonic() - started
            if not any(each.unit is unit for each in backward.entered):  # else gradients come through it once more
                _round(plan, staging, crew, works, gathered.pop(unit.name), found, advance)
                left = {name: work for name, work in left.items() if name not in works}
    staging.sync()
    return found


@contextmanager
def _both(gatherer: FisherGatherer, weights: TokenWeights, number: int) -> Iterator[None]:
    with gatherer.batch(number), weights.batch(number):
        yield


def _modules(skeleton: Skeleton, names: Iterable[str]) -> dict[str, nn.Module]:
    return {name: skeleton.model.get_submodule(name) for name in names}


def _within(unit: Unit, works: Mapping[str, Work]) -> dict[str, Work]:
    return {name: work for name, work in works.items() if name.startswith(f"{unit.name}.")}


def _round(
    plan: Plan,
    staging: Staging,
    crew: Crew,
    works: Mapping[str, Work],
    gatherer: FisherGatherer,
    found: Calibrated,
    advance: Advance,
) -> None:
    """Rounds the weights of a block, by module, and notes them in the journal."""
    started, fewest = time.monotonic(), min(FEWEST_TOKENS, found.tokens)
    seen: dict[str, Fisher | None] = {}
    for name in works:
        fisher = gatherer.found.get(name)
        if fisher and not fisher.is_finite:
            raise NonFiniteError(f"{name}: a gradient of its weight is NaN or infinite", "Try --dtype float32.")
        tokens = fisher.tokens if fisher else 0
        seen[name] = fisher if tokens >= fewest else None
        if tokens < fewest:
            found.unseen[name] = tokens
    tasks = [partial(round_by_fisher, plan, staging, work, seen[name], crew.device) for name, work in works.items()]
    for (name, work), rounding in zip(works.items(), crew.results(tasks)):
        found.roundings[name] = rounding
        advance(work.info.nbytes, work.info.name)
    staging.sync()
    found.seconds["rounding"] += time.monotonic() - started
