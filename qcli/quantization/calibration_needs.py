"""What a calibration will take, from headers and the size of its text: tokens, memory, operations.

Estimates from above. A token of a text is a byte or more. The hidden states of all tokens wait between two blocks, and those that
leave a block stand beside those that enter it; transformers keeps the ones that entered the model. Modules of one parent that are
equally wide are taken to read one input.
"""

import shutil
from collections import defaultdict
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from qcli.calibration.settings import PARALLEL
from qcli.errors import UsageError, together
from qcli.files.whole import check_place
from qcli.memory.model.config import ModelConfig
from qcli.methods.choosing import needs_of
from qcli.quantization.gradient_needs import (
    block_of,
    default_tokens,
    fisher_works,
    gradient_memory,
    gradient_operations,
    weighing_works,
)
from qcli.quantization.plan import Plan
from qcli.sizes import format_bytes

_BYTES_A_TOKEN = 3
_STATES = 3  # of each token: as it entered the model, as it entered the block, as it leaves it
_ITEMSIZE = 4  # of hidden states and of a block that is computed in float32
BATCH = 2048  # tokens: BATCH_TOKENS of qcli.streaming.batches, which loads torch
_INSIDE = 4  # copies of what passes a block's widest module, and of hidden states, while a batch is inside
_COPIES = 8  # float32 copies of the largest weight while it is rounded
_FACTORS = 4  # float64 copies of the largest Hessian
_A_CHANNEL = 2048 * 2 + 1024 * 4 + 24  # bytes of its samples and sums in a file of statistics
_PRODUCTS = 10  # floating-point operations of a weight and a channel: compensation, errors before and after, scales


@dataclass(frozen=True)
class CalibrationNeeds:
    """`tokens` at most; bytes of memory beyond what `Plan.working_memory` counts, of which hidden `states` may wait on the disk,
    where they take `disk` bytes; floating-point operations for a third as many tokens as the text has bytes, which is nearer to
    what tokenizers make of it; bytes of a file of `statistics`."""

    tokens: int
    memory: int
    operations: float
    statistics: int = 0
    states: int = 0
    disk: int = 0


def calibration_needs(plan: Plan, threads: int) -> CalibrationNeeds:
    """See CalibrationNeeds. `threads` round weights at a time. Raises UsageError for a config without a hidden size."""
    assert plan.calibration is not None
    size = _text_size(plan)
    limit = plan.calibration.tokens or default_tokens(plan)
    tokens, likely = min(limit, size), min(limit, size // _BYTES_A_TOKEN)
    blocks: dict[str, int] = defaultdict(int)
    for work in plan.work:
        if block := block_of(work.info.name):
            blocks[block] += work.info.numel
    sites: dict[tuple[str, int], str] = {}
    largest_weight = largest_site = widest = 0
    hidden = int(ModelConfig(plan.source.config, f"config.json of {plan.source.label}").hidden_size)
    gradients, waiting = gradient_memory(plan, hidden, tokens, threads)
    operations = gradient_operations(plan, likely)
    if len(fisher_works(plan)) == len(plan.calibrated) and not plan.calibration.save_statistics:
        return CalibrationNeeds(tokens, gradients, operations, 0, waiting, waiting)
    passes = 1 if plan.calibration.order == PARALLEL else 2
    operations += 2.0 * passes * sum(blocks.values()) * likely
    for work in plan.calibrated:
        if work.linear is None or work.method is None or needs_of(work.method) == "fisher":
            continue
        rows, columns = work.linear.out_features, work.linear.in_features
        largest_weight, widest = max(largest_weight, rows * columns), max(widest, rows + columns)
        if needs_of(work.method) == "hessian":
            largest_site = max(largest_site, columns)
            operations += _PRODUCTS * rows * columns**2
        if needs_of(work.method) == "hessian" or plan.calibration.save_statistics:
            sites[work.linear.module.rpartition(".")[0], columns] = work.info.name
    of_block: dict[str, int] = defaultdict(int)
    stored = sum((4 * columns + _A_CHANNEL) * columns for _, columns in sites)
    for (_, columns), name in sites.items():
        of_block[block_of(name) or name] += 2 * 4 * columns**2  # and those of the segment that is summed
        operations += columns**2 * likely
    states = (_STATES - 1) * _ITEMSIZE * hidden * tokens
    memory = (
        states
        + _ITEMSIZE * hidden * tokens
        + _ITEMSIZE * max(blocks.values(), default=0)
        + max(of_block.values(), default=0)
        + threads * (4 * _COPIES * largest_weight + 8 * _FACTORS * largest_site**2)
        + threads * _ITEMSIZE * _INSIDE * min(tokens, BATCH) * (hidden + widest)
    )
    needed, with_disk = max(memory, gradients), max(memory - states, gradients - waiting)  # one pass after the other
    disk = max(states * 3 // 2, waiting)  # what transformers keeps of them, too
    return CalibrationNeeds(tokens, needed, operations, stored, needed - with_disk, disk)


def stated_by(plan: Plan, dtype: str | None = None) -> dict[str, object]:
    """What the statistics of a plan's texts depend on; without a dtype all but the one in which the model runs."""
    assert plan.calibration is not None
    stated = {name: value for name, value in plan.calibration.identity.items() if name != "order"}
    return {"model": plan.source.fingerprint, **stated, **({} if dtype is None else {"dtype": dtype.removeprefix("torch.")})}


def cluster_problems(plan: Plan) -> list[str]:
    """What a cluster cannot do of a plan's calibration."""
    assert plan.calibration is not None
    found = []
    if fisher_works(plan) or weighing_works(plan):
        found.append("gradients pass a model on one machine; leave out --cluster, or squeezellm and weights=fisher")
    if plan.calibration.order != PARALLEL:
        order = plan.calibration.order
        found.append(f"the texts of a cluster do not wait for rounded blocks; leave out --cluster, or order={order}")
    return found


def statistics_problems(plan: Plan) -> list[str]:
    """What stands against reading or writing the statistics that a plan's calibration names. Raises CheckpointError for a file that
    holds none."""
    assert plan.calibration is not None
    for name in ("statistics", "save_statistics"):
        if getattr(plan.calibration, name) and weighing_works(plan):
            return [f"--{name.replace('_', '-')}: tokens count alike in a file of statistics; leave it out, or weights=fisher"]
    if plan.calibration.save_statistics:
        path = Path(plan.calibration.save_statistics)
        check_place(path)
        needed, free = calibration_needs(plan, 1).statistics, shutil.disk_usage(path.absolute().parent).free
        if needed > free:
            return [f"{path} would take {format_bytes(needed)}, and {format_bytes(free)} are free there"]
    if plan.calibration.statistics:
        from qcli.calibration.stored import StoredStatistics

        found = StoredStatistics(Path(plan.calibration.statistics))
        if difference := found.difference(stated_by(plan)):
            return [difference]
        gradients = {work.index for work in fisher_works(plan)}  # of which a file has nothing
        wanted = [work.linear.module for work in plan.calibrated if work.linear and work.index not in gradients]
        if missing := found.missing(wanted):
            return [together(f"modules have no statistics in {found.path}", missing)]
    return []


def _text_size(plan: Plan) -> int:
    assert plan.calibration is not None
    text = plan.calibration.text
    try:
        return Path(text).stat().st_size if text else len(files("qcli").joinpath("data", "corpus.txt").read_bytes())
    except OSError as e:
        raise UsageError(f"cannot read the text from {text}: {e.strerror}", "Check --text.") from e
