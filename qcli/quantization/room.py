"""The memory and the disk that a plan needs, beside what is there."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from qcli.process import available_memory
from qcli.quantization.calibration_needs import calibration_needs
from qcli.quantization.plan import Plan
from qcli.sizes import format_bytes

DISK_RESERVE = 50_000_000  # for the index, tokenizer files and the file system's own needs


def find_memory(plan: Plan) -> None:
    """Lets hidden states wait on the disk where memory has no room for them. What it has no room for even then is a problem."""
    available, needed = available_memory(), plan.working_memory + calibration_memory(plan)
    if available is None or needed <= available:
        return
    if plan.calibration and (states := calibration_needs(plan, 1).states):
        plan.calibration = replace(plan.calibration, states_on_disk=True)
        needed -= states
        plan.notes.append(
            f"hidden states of {format_bytes(states)} wait on the disk, since {format_bytes(available)} of memory are free"
        )
    if needed > available:
        fewer = "; calibrate on fewer --tokens" if plan.calibration else ""
        plan.problems.append(f"the run needs {format_bytes(needed)} of memory, and {format_bytes(available)} are free{fewer}")


def calibration_memory(plan: Plan) -> int:
    """Bytes that the calibration of a plan takes beside `Plan.working_memory`."""
    if not plan.calibration:
        return 0
    needs = calibration_needs(plan, os.cpu_count() or 1)
    return needs.memory - (needs.states if plan.calibration.states_on_disk else 0)


def check_output(plan: Plan, overwrite: bool) -> None:
    """Adds to the plan's problems what stands against its output folder, and the disk that it needs."""
    final = plan.output
    if final.exists() and not overwrite:
        plan.problems.append(f"{final} exists already; pass --overwrite to replace it, or choose another --output")
    if final.exists() and not final.is_dir():
        plan.problems.append(f"{final} is not a folder")
    if not plan.source.is_hub and final.resolve() == Path(plan.source.label).resolve():
        plan.problems.append(f"the output {final} is the model itself, and an input is never touched; choose another --output")
    parent = next(p for p in [final.absolute().parent, *final.absolute().parents] if p.exists())
    staged = sum(_allocated(final.with_name(final.name + ".partial") / s.name) for s in plan.shards)
    carried = sum(plan.source.place.size(name) for name in plan.source.carried.files)
    waiting = calibration_needs(plan, 1).disk if plan.calibration and plan.calibration.states_on_disk else 0
    weights = 0 if plan.uploads else plan.output_bytes
    needed = plan.disk_bytes = weights + carried - staged + DISK_RESERVE + plan.source.download_bytes(parent) + waiting
    free = shutil.disk_usage(parent).free
    if needed > free:
        plan.problems.append(
            f"the run needs {format_bytes(needed)} of disk at {parent}, {format_bytes(free)} are free"
            + ("; --stream keeps only one source shard at a time" if plan.source.is_hub and not plan.source.stream else "")
        )


def _allocated(path: Path) -> int:
    return path.stat().st_blocks * 512 if path.exists() else 0
