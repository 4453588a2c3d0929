"""How `qcli inspect-outliers --weights-only` shows what it found."""

from qcli import console
from qcli.outliers.weights.inspection import KindFinding, LinearFinding, WeightInspection
from qcli.sizes import format_bytes

_WORST = 5


def show(report: WeightInspection) -> None:
    """Prints what `qcli.outliers.weights.inspect.inspect_weights` found: a line for each kind, not for each tensor."""
    model = report.model
    facts = [model.architecture, f"{model.layers} layers", f"{model.parameters:,} parameters", model.dtype]
    if model.quantization:
        facts.append(f"quantized by {model.quantization}")
    console.out(f"{model.name}: {', '.join(facts)}; weights and headers alone, no forward pass")
    if report.modules_decided_by:
        console.out(f"linear modules found by {report.modules_decided_by}")
    console.out()
    _show_kinds(report.kinds)
    _show_worst(report.linears)
    _show_norms(report)
    _show_columns(report.kinds)
    _show_super_weights(report)
    console.table(
        "",
        ("whole model", "size", "bits per weight"),
        [(s.method, format_bytes(s.bytes), f"{s.bits_per_weight:.3f}") for s in report.sizes],
    )
    for note in report.notes:
        console.out(f"note: {note}")


def _show_kinds(kinds: list[KindFinding]) -> None:
    if not kinds:
        return
    rows = [
        (
            k.kind + ("" if k.quantized else " (kept as it is)"),
            k.weights,
            _figure(k.absmax),
            _figure(k.median_crest),
            _figure(k.median_kurtosis),
            _figure(k.worst_row_spread),
            _figure(k.worst_block_spread),
            *(_decibels(v) for v in k.sqnr.values()),
        )
        for k in kinds
    ]
    console.table(
        "Linear weights", ("kind", "count", "absmax", "absmax/RMS", "kurtosis", "row spread", "block spread", *kinds[0].sqnr), rows
    )
    console.out("absmax/RMS and kurtosis: medians over the layers (a Gaussian has kurtosis 3). Spread: greatest over median")
    console.out("absmax, of the rows and of the blocks of 64, in the worst layer. Decibels: SQNR of all layers together.\n")


def _show_worst(linears: list[LinearFinding]) -> None:
    measured = [x for x in linears if x.quantized and x.sqnr["nf4"] is not None]
    worst = sorted(measured, key=lambda x: (x.sqnr["nf4"], x.module))[:_WORST]
    rows = [
        (x.module, *(_decibels(v) for v in x.sqnr.values()), _figure(x.row_spread), _figure(x.block_spread), _figure(x.kurtosis))
        for x in worst
    ]
    if rows:
        columns = (f"worst {len(rows)} modules", *worst[0].sqnr, "row spread", "block spread", "kurtosis")
        console.table("", columns, rows)


def _show_norms(report: WeightInspection) -> None:
    if not report.norms:
        console.out("No norm with a gain was found.\n")
        return
    candidates = [d for d in report.norm_dims if d.candidate]
    if not candidates:
        console.out(f"Norm gains: no dimension is more than 3 standard deviations off in most of the {len(report.norms)} norms.\n")
        return
    console.out("Norm gains: dimensions more than 3 standard deviations off in most norms, candidates for outlier features")
    console.table(
        "",
        ("dim", "of", "norms", "share", "greatest z"),
        [(d.dim, d.channels, f"{d.norms} of {d.of}", f"{d.share:.0%}", f"{d.max_z:.1f}") for d in candidates],
    )


def _show_columns(kinds: list[KindFinding]) -> None:
    """Only dims that most weights of a kind share: one that stands out once is nothing to show."""
    rows = [
        (k.kind, " ".join(f"{d.dim} ({d.share:.0%})" for d in shared))
        for k in kinds
        if (shared := [d for d in k.column_dims if d.share > 0.5])
    ]
    if rows:
        console.out("Input columns whose standard deviation has z > 4 in most layers")
        console.table("", ("kind", "dim (share of layers)"), rows, left=(0, 1))


def _show_super_weights(report: WeightInspection) -> None:
    found = report.super_weights
    if found:
        console.out("Super weight candidates: each stands out in a down projection of an early layer; a forward pass decides")
        rows = [(w.module, w.row, w.column, f"{w.weight:.4g}", _figure(w.times_rms), _figure(w.times_next)) for w in found]
        console.table("", ("module", "row", "column", "weight", "times RMS", "times the next"), rows)
    elif any(linear.largest is not None for linear in report.linears):
        console.out("Super weights: no single weight stands out in the down projections of the early layers.\n")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} dB"
