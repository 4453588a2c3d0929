"""How `qcli quantize` shows a plan and a report."""

import re
import shlex

from qcli import console
from qcli.checkpoint import dtypes
from qcli.process import resident_memory
from qcli.quantization.plan import Plan, Unit
from qcli.quantization.report import Report
from qcli.sizes import format_bytes, format_seconds


def show_plan(plan: Plan) -> None:
    """Prints what becomes what, file by file sizes, and what the run needs."""
    console.out(f"{plan.source.label} -> {plan.output}   {_method_text(plan)}")
    console.out(f"modules chosen by {plan.layout.decided_by}; everything else {dtypes.TORCH_NAMES[plan.dtype]}\n")
    rows = []
    for units in _groups(plan.units):
        first = units[0]
        shape = "x".join(map(str, first.info.shape)) or "scalar"
        before, after = sum(u.info.nbytes for u in units), sum(u.output_bytes for u in units)
        rows.append(
            (
                _group_name(units),
                len(units),
                shape,
                dtypes.TORCH_NAMES.get(first.info.dtype, first.info.dtype),
                _becomes(plan, first),
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
        f"{format_bytes(plan.working_memory)} of it beyond Python and its libraries"
    )
    for note in plan.notes:
        console.out(f"note: {note}")


def carried_text(plan: Plan) -> str:
    """A line on the files that go along as they are."""
    names = plan.source.carried.files
    size = sum(plan.source.place.size(name) for name in names)
    return f"carried over       {len(names)} files, {format_bytes(size)}: {', '.join(names)}" if names else ""


def needed(plan: Plan) -> dict[str, int]:
    """Disk and memory that the run will take, in bytes."""
    return {"disk_bytes": plan.disk_bytes, "peak_memory_bytes": resident_memory() + plan.working_memory}


def plan_summary(plan: Plan) -> dict[str, object]:
    """The plan for JSON, tensor by tensor."""
    return {
        "source": plan.source.label,
        "output": str(plan.output),
        "method": plan.method.name,
        "options": vars(plan.method),
        "dtype": dtypes.TORCH_NAMES[plan.dtype],
        "compute_dtype": plan.compute_dtype,
        "modules_decided_by": plan.layout.decided_by,
        "skip_modules": plan.skip_modules,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.output_bytes,
        **needed(plan),
        "files": [{"name": s.name, "bytes": s.size} for s in plan.shards],
        "carried_files": plan.source.carried.files,
        "tensors": [
            {
                "name": u.info.name,
                "shape": list(u.info.shape),
                "from": u.info.dtype,
                "to": _becomes(plan, u),
                "bytes_before": u.info.nbytes,
                "bytes_after": u.output_bytes,
            }
            for u in plan.units
        ],
        "notes": plan.notes,
        "problems": plan.problems,
    }


def show_report(report: Report) -> None:
    """Prints measured errors, sizes, time and what to do next."""
    columns = ("weights", "relative error", "SQNR")
    cells = [(k.name, f"{k.weights:,}", f"{k.relative_error:.3%}", k.sqnr_text) for k in report.kinds]
    console.table("", ("module kind", *columns), cells)
    cells = [(k.name, f"{k.weights:,}", f"{k.relative_error:.3%}", k.sqnr_text) for k in report.worst]
    console.table("", (f"worst {len(cells)} modules", *columns), cells)
    for name, count in report.nonfinite.items():
        console.out(f"carried {count:,} NaN or infinite values in {name}")
    saved = report.source_bytes / max(report.output_bytes, 1)
    console.out(
        f"{report.quantized_modules} modules in {report.method}: {format_bytes(report.source_bytes)} -> "
        f"{format_bytes(report.output_bytes)} ({saved:.2f}x smaller), {report.bits_per_weight:.3f} bits per weight"
    )
    console.out(f"{format_seconds(report.seconds)}, peak memory {format_bytes(report.peak_memory)}")
    console.out(f"wrote {report.output}" + (f"\nuploaded to {report.url}" if report.url else ""))
    console.out(f'next: qcli generate {shlex.quote(report.output)} "Once upon a time"')


def _method_text(plan: Plan) -> str:
    options = ", ".join(f"{name} {str(value).lower()}" for name, value in vars(plan.method).items())
    return f"{plan.method.name} ({options}), computes in {plan.compute_dtype}"


def _becomes(plan: Plan, unit: Unit) -> str:
    if unit.linear:
        return plan.method.name
    code = unit.outputs[0].dtype
    return dtypes.TORCH_NAMES.get(code, code)


def _groups(units: list[Unit]) -> list[list[Unit]]:
    """Units that differ only in layer numbers, in the order of their first."""
    groups: dict[tuple, list[Unit]] = {}
    for unit in units:
        key = (re.sub(r"\d+", "#", unit.info.name), unit.info.shape, unit.info.dtype, unit.outputs[0].dtype, unit.linear is None)
        groups.setdefault(key, []).append(unit)
    return list(groups.values())


def _group_name(units: list[Unit]) -> str:
    """model.layers.[0-31].mlp.up_proj.weight: each number that varies becomes the range it takes."""
    split = [re.split(r"(\d+)", u.info.name) for u in units]
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
