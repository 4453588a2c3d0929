"""An estimate in a terminal: components, verdicts, a bar for each GPU, and the formulas."""

import re
from collections.abc import Sequence

from qcli import console
from qcli.memory.costs.quantizing import Quantizing
from qcli.memory.estimate import Estimate, MethodEstimate
from qcli.memory.model.like_llama import shape_of
from qcli.memory.paper_table import Row
from qcli.memory.placing.hardware import Gpu
from qcli.memory.placing.verdict import NO
from qcli.memory.shown.bars import bars, parts_of
from qcli.memory.what_fits import Largest, WhatFits
from qcli.sizes import format_bytes, format_seconds

_SHADES, _LETTERS = "█▓▒░", "#=+-"  # of a bar's parts; the second where the terminal has no shades
_SHORT = {NO: "no"}
_COLOURS = ("blue", "green", "yellow", "magenta")


def show(found: Estimate, *, explain: bool) -> None:
    """Prints all parts of an estimate. `explain` adds the formulas."""
    model, setting = found.model, found.setting
    config = model.config
    limit = f", made for {config.max_context:,} tokens" if config.max_context else ""
    console.out(
        f"{model.label}: {config.model_type}, {model.parameter_count:,} parameters ({model.read}), {config.layers} layers{limit}"
    )
    use = f"training by {setting.train}, rank {setting.rank}" if setting.train else f"run by {setting.runtime}"
    console.out(f"{setting.context:,} tokens, batch {setting.batch}, {use}")
    _components(found)
    if found.gpus:
        _verdicts(found)
        _splits(found)
    _bars(found)
    for row in found.methods:
        if row.advice is not None:
            console.out(_sentence(found, row))
    for sentence in found.notes:
        console.say(f"note: {sentence}")
    for sentence in found.assumed:
        console.say(f"assumed: {sentence}")
    _say_gpus(found.gpus)
    if explain:
        _explain(found)


def show_what_fits(found: WhatFits) -> None:
    """Prints the largest model like Llama 3 under each method, then a row for each well-known model."""
    setting = found.setting
    console.out(f"{_named(found.gpus)}: {setting.context:,} tokens, batch {setting.batch}, run by {setting.runtime}")
    console.table(
        "the largest model like Llama 3 that fits",
        ["method", "parameters", "needs", "shape"],
        [_largest(row) for row in found.largest],
        left=(0, 3),
    )
    console.table(
        "well-known models",
        ["model", "parameters", "tokens", *(row.method for row in found.largest)],
        [
            [
                row.model.label,
                _count(row.model.parameter_count),
                f"{row.context:,}",
                *(f"{_SHORT.get(each.verdict, each.verdict)}  {format_bytes(each.needs.most)}" for each in row.verdicts),
            ]
            for row in found.known
        ],
    )
    for sentence in found.notes:
        console.say(f"note: {sentence}")
    _say_gpus(found.gpus)


def _largest(row: Largest) -> list[str]:
    if row.model is None or row.needs is None:
        return [row.method, "none", "", ""]
    return [row.method, _count(row.model.parameter_count), format_bytes(row.needs.most), shape_of(row.model.config)]


def _count(number: int) -> str:
    """Parameters, as models are named: "135M", "8.03B", "1.10T"."""
    for unit, size in (("T", 10**12), ("B", 10**9)):
        if number >= size:
            return f"{number / size:.2f}{unit}" if number < 100 * size else f"{number / size:.0f}{unit}"
    return f"{number / 1e6:.0f}M"


def show_quantizing(runs: Sequence[Quantizing]) -> None:
    """Prints a row for each run; nothing where there is none."""
    if not runs:
        return
    console.table(
        "qcli quantize on this machine",
        ["method", "memory", "disk", "download", "time"],
        [[run.method, format_bytes(run.memory), format_bytes(run.disk), format_bytes(run.download), _time(run)] for run in runs],
    )
    rates = f"reads {format_bytes(runs[0].read_rate)}/s and writes {format_bytes(runs[0].write_rate)}/s"
    console.out(f"Memory is above Python and its libraries. This disk {rates}, measured now.")


def _time(run: Quantizing) -> str:
    return format_seconds(run.seconds) + (" after the download" if run.download else "")


def show_table(rows: Sequence[Row], rule: str) -> None:
    """Prints the hardware table, and the rule by which it was made."""
    console.table(
        "",
        ["class", "hardware", "largest in 8 bits", "largest in 16 bits"],
        [
            [row.hardware.kind, row.hardware.label, " / ".join(row.largest_8bit) or "none", " / ".join(row.largest_16bit) or "none"]
            for row in rows
        ],
        left=(0, 1, 2, 3),
    )
    console.out(rule)


def _say_gpus(gpus: Sequence[Gpu]) -> None:
    for said in dict.fromkeys(gpu.said for gpu in gpus):
        console.say(said)


def _components(found: Estimate) -> None:
    names = list(dict.fromkeys(part.name for row in found.methods for part in row.components))
    console.table(
        "",
        ["method", "bits/weight", *names, "overhead", "total"],
        [
            [
                row.method,
                f"{row.bits_per_weight:.3f}",
                *(format_bytes(row.component(name)) for name in names),
                _range(row.needs.overhead[::2]),
                _range((row.needs.least, row.needs.most)),
            ]
            for row in found.methods
        ],
    )


def _range(sizes: tuple[int, int]) -> str:
    low, high = format_bytes(sizes[0]), format_bytes(sizes[1])
    if low == high:
        return low
    return f"{low.partition(' ')[0]}-{high}" if low.split()[1] == high.split()[1] else f"{low} - {high}"


def _verdicts(found: Estimate) -> None:
    rows = []
    for row in found.methods:
        left = row.placement.left
        over = f"{format_bytes(left)} left" if left >= 0 else f"{format_bytes(-left)} short"
        rows.append([row.method, row.placement.verdict, over, _reach(row.context, "tokens"), _reach(row.batch)])
    asked = f"{found.setting.context:,} tokens"
    console.table(
        f"on {_named(found.gpus)}",
        ["method", "verdict", "", f"largest context at batch {found.setting.batch}", f"largest batch at {asked}"],
        rows,
        left=(0, 1),
    )


def _reach(reach, unit: str = "") -> str:
    if not reach.value:
        return "none"
    return f"{reach.value:,} {unit}".rstrip() + ("" if reach.bound == "memory" else f" ({reach.bound})")


def _named(gpus: Sequence[Gpu]) -> str:
    counts: dict[str, int] = {}
    for gpu in gpus:
        name = f"{gpu.name} ({format_bytes(gpu.memory)})"
        counts[name] = counts.get(name, 0) + 1
    return " + ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())


def _splits(found: Estimate) -> None:
    if len(found.gpus) < 2:
        return
    for row in found.methods:
        if row.placement.verdict == NO:
            continue
        how = 'as device_map="auto" splits it'
        if found.setting.runtime == "vllm":
            how = "a split of its layers that fits"
        elif not row.placement.automatic:
            how = 'a device map to give by hand, since that of device_map="auto" does not fit'
        console.table(
            f"{row.method}: {how}",
            ["GPU", "holds", *parts_of(found.setting)[:3], "left"],
            [
                [
                    f"{i}",
                    load.holds,
                    format_bytes(load.weights),
                    format_bytes(load.state),
                    format_bytes(load.activations),
                    format_bytes(load.left),
                ]
                for i, load in enumerate(row.placement.loads)
            ],
            left=(0, 1),
        )


def _bars(found: Estimate) -> None:
    stacked = bars(found)
    width = max(len(bar.label) for bar in stacked)
    whole = max(bar.used for bar in stacked)
    looks = _SHADES if console.can_show(_SHADES) else _LETTERS
    for bar in stacked:
        note = format_bytes(bar.used) + (f" of {format_bytes(bar.memory)}" if bar.memory else "")
        parts = list(zip(bar.parts.values(), looks, _COLOURS))
        console.bar(bar.label.ljust(width), parts, bar.memory or whole, note)
    console.out(" " * (width + 1) + "  ".join(f"{look} {name}" for look, name in zip(looks, parts_of(found.setting))))


def _sentence(found: Estimate, row: MethodEstimate) -> str:
    state = "fits only if the overhead is small" if row.placement.verdict != NO else "does not fit"
    ways = list(row.advice.options)
    if row.advice.count:
        ways.append(f"--gpu {row.advice.count}x{found.gpus[0].name.replace(' ', '')}")
    if row.advice.on_cpu:
        ways.append(f"--device-map auto with {format_bytes(row.advice.on_cpu)} of the layers in the CPU's memory")
    return f"{row.method} {state}; " + (f"what would: {', '.join(ways)}" if ways else "nothing that was tried would")


def _explain(found: Estimate) -> None:
    for row in found.methods:
        console.out(f"\n{row.method}")
        for part in row.components:
            console.out(f"  {part.name}: {format_bytes(part.bytes)}")
            for sentence in part.formula:
                console.out(f"    {_grouped(sentence)}")
        console.out(f"  overhead on each GPU: {_range(row.needs.overhead[::2])}")
        for sentence in row.overhead:
            console.out(f"    {_grouped(sentence)}")


def _grouped(sentence: str) -> str:
    """The sentence with commas between thousands, except in shapes, whose numbers have commas between them."""
    return re.sub(r"\[[^]]*\]|(?<![\d.,])\d{4,}(?![\d.,]*\d)", lambda m: m[0] if m[0][0] == "[" else f"{int(m[0]):,}", sentence)
