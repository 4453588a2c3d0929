"""How `qcli evaluate` shows what it found, and what it writes to a CSV file."""

import math
from collections.abc import Iterator

from qcli import console
from qcli.evaluation.result import Evaluation, Row
from qcli.evaluation.statistics import Comparison, Uncertain
from qcli.sizes import format_bytes


def show(result: Evaluation) -> None:
    """Prints the rows, what was rounded and how fast each is in tables of their own, the comparison with a base, the protocol."""
    compared = len(result.rows) > 1
    what = "method" if result.simulated else "model"
    columns = [what, "bits/weight", "weights", "perplexity"]
    columns += ["change", "KL (nats)", "same top"] if compared else ["loss (nats)", "bits/byte"]
    console.table("", columns, [_cells(row, compared) for row in result.rows])
    if result.simulated:
        columns = [what, "weights", "activations", "ordinary activations"]
        console.table("SQNR", columns, [_rounding(row) for row in result.rows])
    if any(row.speed for row in result.rows):
        columns = [what, "prefill", "decode", "peak memory"]
        console.table("speed", columns, [_speed(row) for row in result.rows if row.speed])
    if not result.simulated and result.rows[-1].against:
        _show_comparison(result.rows[-1].against, result.rows[0].name)
    if result.simulated:
        console.out(
            f"Methods simulated in {result.model}. bits/weight is of the linear layers; "
            "change, of perplexity against the unquantized model; "
            "ordinary activations are those of columns without an outlier."
        )
    for sentence in [*result.protocol.sentences(), *result.notes]:
        console.out(sentence)


def _cells(row: Row, compared: bool) -> list[str]:
    quality, against = row.quality, row.against
    cells = [row.name, f"{row.bits_per_weight:.3f}", format_bytes(row.bytes), _estimate(quality.perplexity)]
    if not compared:
        return cells + [_estimate(quality.loss), _estimate(quality.bits_per_byte)]
    if against is None:
        return cells + ["-"] * 3
    return cells + [_change(against), _estimate(against.divergence.mean), f"{against.same_top.value:.2%}"]


def _rounding(row: Row) -> list[str]:
    return [row.name, *(_decibels(x) for x in (row.weight_sqnr, row.activation_sqnr, row.ordinary_activation_sqnr))]


def _speed(row: Row) -> list[str]:
    speed = row.speed
    decode = "-" if speed.decode is None else f"{speed.decode:,.1f}/s"
    return [row.name, f"{speed.prefill:,.1f}/s", decode, format_bytes(speed.peak_memory)]


def _show_comparison(found: Comparison, base: str) -> None:
    kl = found.divergence
    rows = [
        ("KL divergence (nats), mean", _estimate(kl.mean)),
        *[
            (f"KL divergence (nats), {name}", _number(value))
            for name, value in (
                ("median", kl.median),
                ("90%", kl.percentile_90),
                ("95%", kl.percentile_95),
                ("99%", kl.percentile_99),
                ("99.9%", kl.percentile_99_9),
                ("maximum", kl.maximum),
            )
        ],
        ("same likeliest token", _estimate(found.same_top, percent=True)),
        ("change of loss (nats)", _estimate(found.loss_change)),
        ("change of perplexity", _estimate(found.perplexity_change)),
        ("ratio of perplexities", _estimate(found.perplexity_ratio)),
        ("change of the right token's probability, mean", _estimate(found.probability_change, percent=True)),
        ("change of the right token's probability, RMS", _estimate(found.probability_rms_change, percent=True)),
    ]
    console.table("", (f"against {base}", "value"), rows)


def _change(against: Comparison) -> str:
    ratio = against.perplexity_ratio
    return _estimate(Uncertain(ratio.value - 1, ratio.error), percent=True, sign=True)


def _decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"


def _number(value: float) -> str:
    """Four significant figures."""
    return f"{value:.4g}"


def _estimate(estimate: Uncertain, percent: bool = False, sign: bool = False) -> str:
    """The value to the second figure of its error, and the error."""
    scale, unit = (100, "%") if percent else (1, "")
    value, error = estimate.value * scale, estimate.error * scale
    plus = "+" if sign else ""
    if not (math.isfinite(error) and error > 0 and math.isfinite(value)):
        return f"{value:{plus}.4g}{unit}"
    if max(abs(value), error) < 1e-4:
        return f"{value:{plus}.2e}{unit} ± {error:.1e}{unit}"
    places = max(1 - math.floor(math.log10(error)), 0)
    return f"{value:{plus}.{places}f}{unit} ± {error:.{places}f}{unit}"


def rows(result: Evaluation) -> tuple[list[str], list[list]]:
    """Columns and lines for CSV: all that is known of each row, beside the protocol."""
    summary = result.summary()
    common = {"model": result.model, **summary["protocol"]}
    flat = [dict(_flat(common | row)) for row in summary["rows"]]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    return columns, [[row.get(name) for name in columns] for row in flat]


def _flat(value: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, part in value.items():
        if isinstance(part, dict):
            yield from _flat(part, f"{prefix}{name}.")
        elif part is not None:
            yield prefix + name, part
