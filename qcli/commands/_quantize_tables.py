"""How `qcli quantize` shows a plan and a report."""

import re
import shlex
import time
from collections.abc import Callable
from importlib import import_module

from qcli import console, methods
from qcli.checkpoint import dtypes
from qcli.process import resident_memory
from qcli.quantization.calibration_needs import calibration_needs
from qcli.quantization.calibration_report import CalibrationReport
from qcli.quantization.plan import Plan, Work
from qcli.quantization.report import Report
from qcli.quantization.room import calibration_memory
from qcli.sizes import format_bytes, format_seconds


def show_plan(plan: Plan) -> None:
    """Prints what becomes what, file by file sizes, and what the run needs."""
    console.out(f"{plan.source.label} -> {plan.output}   {_method_text(plan)}")
    console.out(f"modules chosen by {plan.decided_by}; everything else {dtypes.TORCH_NAMES[plan.dtype]}\n")
    rows = []
    for group in _groups(plan.work):
        first = group[0]
        shape = "x".join(map(str, first.info.shape)) or "scalar"
        before, after = sum(w.info.nbytes for w in group), sum(w.output_bytes for w in group)
        rows.append(
            (
                _group_name(group),
                len(group),
                shape,
                dtypes.TORCH_NAMES.get(first.info.dtype, first.info.dtype),
                first.becomes,
                f"{before:,}",
                f"{after:,}",
            )
        )
    console.table("", ("tensor", "count", "shape", "from", "to", "bytes before", "bytes after"), rows, left=(0, 3, 4))
    console.table("", ("file", "bytes"), [(s.name, f"{s.size:,}") for s in plan.shards])
    console.out(carried_text(plan))
    needs = needed(plan)
    console.out(f"bits per weight    {plan.bits_per_weight:.3f} in all, {plan.quantized_bits_per_weight:.3f} where quantized")
    console.out(f"weights            {format_bytes(plan.source_bytes)} -> {format_bytes(plan.output_bytes)}")
    console.out(f"disk needed        {format_bytes(needs['disk_bytes'])}")
    console.out(
        f"peak memory        about {format_bytes(needs['peak_memory_bytes'])}, "
        f"{format_bytes(plan.working_memory + calibration_memory(plan))} of it beyond Python and its libraries"
    )
    if needs["calibration_tokens"]:
        console.out(
            f"calibration        at most {needs['calibration_tokens']:,} tokens, about "
            f"{format_seconds(needs['calibration_seconds'])} at the rate of this CPU's float32 products"
        )
    for note in plan.notes:
        console.out(f"note: {note}")


def carried_text(plan: Plan) -> str:
    """A line on the files that go along as they are."""
    names = plan.source.carried.files
    size = sum(plan.source.place.size(name) for name in names)
    return f"carried over       {len(names)} files, {format_bytes(size)}: {', '.join(names)}" if names else ""


def needed(plan: Plan) -> dict[str, int | None]:
    """Disk and memory that the run will take, in bytes. For the memory of the libraries they are loaded, as the run would."""
    import_module("qcli.quantization.execute")
    memory = plan.working_memory + calibration_memory(plan)
    found: dict[str, int | None] = {"disk_bytes": plan.disk_bytes, "peak_memory_bytes": resident_memory() + memory}
    needs = calibration_needs(plan, torch_threads()) if plan.calibration else None
    found["calibration_tokens"] = needs.tokens if needs else None
    found["calibration_seconds"] = round(needs.operations / operations_per_second()) if needs else None
    return found


def torch_threads() -> int:
    """Threads that round weights at a time."""
    import torch

    return torch.get_num_threads()


def operations_per_second() -> float:
    """The rate of this machine's float32 products, measured on a small one."""
    import torch

    x = torch.ones(768, 768)
    x @ x
    best = min(_seconds(lambda: x @ x) for _ in range(5))
    return 2 * 768**3 / best


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def plan_summary(plan: Plan) -> dict[str, object]:
    """The plan for JSON, tensor by tensor."""
    return {
        "source": plan.source.label,
        "output": str(plan.output),
        "method": plan.method_name,
        "options": methods.options_of(plan.method),
        "recipe": plan.recipe.summary(),
        "format": plan.format.name,
        "dtype": dtypes.TORCH_NAMES[plan.dtype],
        "compute_dtype": plan.compute_dtype,
        "modules_decided_by": plan.decided_by,
        "skip_modules": plan.skip_modules,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.output_bytes,
        **needed(plan),
        "files": [{"name": s.name, "bytes": s.size} for s in plan.shards],
        "carried_files": plan.source.carried.files,
        "tensors": [
            {
                "name": w.info.name,
                "shape": list(w.info.shape),
                "from": w.info.dtype,
                "to": w.becomes,
                "bytes_before": w.info.nbytes,
                "bytes_after": w.output_bytes,
            }
            for w in plan.work
        ],
        "notes": plan.notes,
        "problems": plan.problems,
    }


def show_report(report: Report) -> None:
    """Prints measured errors, sizes, time and what to do next."""
    if report.calibration and report.calibration.checked and report.calibration.checked.is_worse:
        console.out("calibration made it worse on held-out text: leave out --calibrate, or give it more and other text\n")
    columns = ("weights", "relative error", "SQNR")
    cells = [(k.name, f"{k.weights:,}", f"{k.errors.relative_error:.3%}", k.sqnr_text) for k in report.kinds]
    console.table("", ("module kind", *columns), cells)
    cells = [(k.name, f"{k.weights:,}", f"{k.errors.relative_error:.3%}", k.sqnr_text) for k in report.worst]
    console.table("", (f"worst {len(cells)} modules", *columns), cells)
    for name, count in report.nonfinite.items():
        console.out(f"carried {count:,} NaN or infinite values in {name}")
    if report.calibration:
        _show_calibration(report.calibration)
    saved = report.source_bytes / max(report.output_bytes, 1)
    console.out(
        f"{report.quantized_modules} modules in {report.method}: {format_bytes(report.source_bytes)} -> "
        f"{format_bytes(report.output_bytes)} ({saved:.2f}x smaller), {report.bits_per_weight:.3f} bits per weight"
    )
    console.out(f"{format_seconds(report.seconds)}, peak memory {format_bytes(report.peak_memory)}")
    console.out(f"wrote {report.output}" + (f"\nuploaded to {report.url}" if report.url else ""))
    console.out(f'next: qcli generate {shlex.quote(report.output)} "Once upon a time"')


def _show_calibration(found: CalibrationReport) -> None:
    columns = (f"outputs on {found.tokens:,} tokens", "modules", "relative error", "without calibration")
    cells = [(k.name, k.modules, f"{k.relative_error:.3%}", f"{k.plain_relative_error:.3%}") for k in found.kinds]
    if cells:
        console.table("", columns, cells)
    for note in found.notes:
        console.out(f"note: {note}")
    seconds = ", ".join(f"{name} {format_seconds(value)}" for name, value in found.seconds.items() if value >= 0.05)
    if seconds:
        console.out(f"calibrated on {found.tokens:,} tokens of {found.text}: {seconds}")
    checked = found.checked
    if checked is None:
        console.out("nothing was held out to measure the result on")
        return
    console.out(
        f"{checked.tokens:,} held-out tokens: KL divergence {checked.kl:.5f} ± {checked.kl_error:.5f}, without calibration "
        f"{checked.plain_kl:.5f} ± {checked.plain_kl_error:.5f}; "
        f"perplexity {checked.source_perplexity:.3f} -> {checked.perplexity:.3f}"
    )


def _method_text(plan: Plan) -> str:
    options = ", ".join(f"{name} {str(value).lower()}" for name, value in methods.options_of(plan.method).items())
    text = f"{plan.method_name} ({options})"
    if plan.is_mixed:
        text = ", ".join(f"{count} modules in {name}" for name, count in plan.schemes.items())
    return f"{text}, computes in {plan.compute_dtype}"


def _groups(works: list[Work]) -> list[list[Work]]:
    """Work on tensors that differ only in layer numbers, in the order of their first."""
    groups: dict[tuple, list[Work]] = {}
    for work in works:
        key = (re.sub(r"\d+", "#", work.info.name), work.info.shape, work.info.dtype, work.becomes)
        groups.setdefault(key, []).append(work)
    return list(groups.values())


def _group_name(group: list[Work]) -> str:
    """model.layers.[0-31].mlp.up_proj.weight: each number that varies becomes the range it takes."""
    split = [re.split(r"(\d+)", work.info.name) for work in group]
    parts = list(split[0])
    for i in range(1, len(parts), 2):
        values = sorted({int(s[i]) for s in split})
        if len(values) > 1:
            parts[i] = f"[{_ranges(values)}]"
    return "".join(parts)


def _ranges(values: list[int]) -> str:
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
