"""A plan's work by the files of its output, as machines take it."""

from collections.abc import Collection

from qcli.calibration.settings import SEGMENTS
from qcli.quantization.calibration_needs import calibration_needs
from qcli.quantization.plan import Plan, Work
from qcli.sizes import format_bytes


def division(plan: Plan, left: Collection[int]) -> list[tuple[str, list[Work]]]:
    """The work of `left`, indices of `plan.work`, by the file of the output that it is in. The file with the most bytes to read
    comes first, so that the last to end is a small one."""
    by_file: dict[str, list[Work]] = {shard.name: [] for shard in plan.shards}
    for work in plan.work:
        if work.index in left:
            by_file[work.outputs[0].file].append(work)
    found = [(file, works) for file, works in by_file.items() if works]
    return sorted(found, key=lambda item: -sum(work.info.nbytes for work in item[1]))


def summary(plan: Plan, workers: int | None) -> str:
    """What a cluster would do, in a sentence."""
    parts = division(plan, range(len(plan.work)))
    reads = [sum(work.info.nbytes for work in works) for _, works in parts]
    writes = [sum(work.output_bytes for work in works) for _, works in parts]
    count = f"{len(parts):,} files, each" if len(parts) > 1 else "one file,"
    each = f"{count} read from up to {format_bytes(max(reads))} and written in {format_bytes(max(writes))}"
    memory = f"{format_bytes(plan.working_memory)} of memory a worker beyond Python and its libraries"
    if plan.calibration:
        needs = calibration_needs(plan, 1)
        takers = min(workers or SEGMENTS, SEGMENTS)
        memory = f"{format_bytes(plan.working_memory + needs.memory - needs.states + needs.states // takers)} of memory a worker"
        traffic = needs.statistics * (SEGMENTS + (workers or SEGMENTS))
        each += f"; texts for up to {SEGMENTS} workers, about {format_bytes(traffic)} of statistics between machines"
    if workers is None:
        return f"{each}; {memory}"
    loads = [0] * workers
    for size in reads:
        loads[loads.index(min(loads))] += size
    return f"{each}; of {workers:,} workers the one with the most reads {format_bytes(max(loads))}; {memory}"
