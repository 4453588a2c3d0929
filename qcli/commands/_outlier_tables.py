"""How `qcli inspect-outliers` shows what it found, and its rows for CSV."""

from collections.abc import Iterator

from qcli import console
from qcli.outliers.inspection import Activations, Inspection, Layer, Site, Sqnr, Table4
from qcli.outliers.paper import Row

_SHORT = {"attention input": "attention in", "attention output": "attention out", "ffn input": "ffn in", "ffn output": "ffn out"}
_DIMS_SHOWN, _FEATURES_SHOWN, _SPIKES_SHOWN = 4, 12, 8


def show(report: Inspection) -> None:
    """Prints the tables, the paper's row, what was ablated, and the recommendation."""
    model, text = report.model, report.text
    kind = f"{model.quantization}, " if model.quantization else ""
    console.out(f"{model.name}: {model.architecture}, {model.layers} layers of {model.hidden_size} dimensions, {kind}{model.dtype}")
    apart = f"; {text.bos_tokens:,} first tokens are counted apart" if text.bos_tokens else ""
    console.out(
        f"{text.tokens:,} tokens of {text.name} in {text.sequences:,} sequences of up to {text.sequence_length:,}"
        f"{apart}; outliers are {report.threshold:g} or more"
    )
    console.out()
    _sites(report)
    _damage(report)
    _features(report)
    _table_4(report)
    _spikes(report)
    _ablation(report)
    for note in report.notes:
        console.out(f"note: {note}")
    _recommendation(report)


def _sites(report: Inspection) -> None:
    rows = []
    for layer in report.layers:
        rows += [_activations(layer.layer, _SHORT.get(site.kind, site.kind), site) for site in layer.sites]
        if layer.residual:
            rows.append(_activations(layer.layer, "residual", layer.residual))
    console.table(
        "inputs of linear layers, and the residual stream that leaves each block",
        ("layer", "site", "outlier dims: largest value", "positions", "absmax/RMS", "kurtosis", "channels", "tokens"),
        rows,
        left=(1, 2),
    )
    console.out(
        "positions: at which the first of the dims is an outlier. channels, tokens: greatest to median absmax. kurtosis: 3 for a "
        "Gaussian."
    )
    console.out()


def _activations(layer: int, name: str, site: Activations) -> tuple:
    first = site.dims[:_DIMS_SHOWN]
    dims = ", ".join(f"{d.dim}: {_number(d.absmax)}" for d in first)
    more = site.outlier_columns - len(first)
    return (
        layer,
        name,
        dims + (f" and {more:,} more" if more > 0 else ""),
        _percent(first[0].share) if first else "-",
        _number(site.crest),
        _number(site.kurtosis),
        _number(site.channel_ratio),
        _number(site.token_ratio),
    )


def _damage(report: Inspection) -> None:
    measured = [(layer, site) for layer, site in _each(report) if site.sqnr]
    if not measured:
        return
    methods = list(measured[0][1].sqnr or ())
    rows = [
        (layer.layer, _SHORT.get(site.kind, site.kind), *(_pair(site.sqnr[name]) for name in methods)) for layer, site in measured
    ]
    console.table("SQNR of the outputs, dB: all / through channels without outliers", ("layer", "site", *methods), rows, left=(1,))
    console.out()


def _features(report: Inspection) -> None:
    features = report.features[:_FEATURES_SHOWN]
    if not features:
        console.out(f"No dimension of a hidden state reaches {report.threshold:g} anywhere.")
        console.out()
        return
    rows = [
        (
            f.dim,
            "yes" if f.outlier else "no",
            _percent(f.layers_share),
            _percent(f.positions_share),
            _percent(f.positions_union),
            _number(f.absmax),
            _quartiles(f.quartiles),
            "yes" if f.one_sided else "no",
        )
        for f in features
    ]
    columns = ("dim", "outlier feature", "layers", "positions", "in any layer", "absmax", "quartiles", "one-sided")
    console.table("dimensions of the hidden state", columns, rows, left=())
    console.out(
        f"An outlier feature shows in {report.min_layers:.0%} of the layers and at {report.min_positions:.0%} of all "
        "positions of all hidden states."
    )
    console.out()


def _table_4(report: Inspection) -> None:
    found = report.table4
    own = (report.model.name, _count(report.model.parameters) or "-", *_row_4(found, found.positions_union))
    rows = [own, *((row.model, row.parameters, *_row_4(row, None)) for row in found.papers_rows)]
    columns = (
        "model",
        "parameters",
        "perplexity",
        "outliers",
        "one-sided",
        "layers",
        "positions",
        "in any layer",
        "quartiles",
        "top-1 p",
        "without",
    )
    console.table("LLM.int8(), Table 4: this model, and the paper's", columns, rows, left=(0,))
    console.out(found.stage)
    console.out("The paper's perplexities are on C4; compare outliers, layers and positions, not perplexities.")
    console.out()


def _row_4(row: Row | Table4, union: float | None) -> tuple:
    return (
        _number(row.perplexity),
        row.outliers,
        row.one_sided,
        _percent(row.layers_share),
        _percent(row.positions_share),
        _percent(union),
        _quartiles(row.quartiles),
        _percent(row.top1_with),
        _percent(row.top1_without),
    )


def _spikes(report: Inspection) -> None:
    massive = report.massive_activations
    if massive:
        rows = [
            (
                m.layer,
                m.dim,
                m.position,
                repr(m.token),
                _number(m.value),
                _number(abs(m.value) / m.median) if m.median else "-",
                m.sequences,
            )
            for m in massive[:_SPIKES_SHOWN]
        ]
        columns = ("layer", "dim", "position", "token", "value", "times the median", "sequences")
        console.table("massive activations of the residual stream", columns, rows, left=(3,))
        if len(massive) > _SPIKES_SHOWN:
            console.out(f"and {len(massive) - _SPIKES_SHOWN} more")
    else:
        console.out("No massive activations: no value above 100 and 1000 times the median of its hidden state.")
    for weight in report.super_weights:
        console.out(
            f"super weight: layer {weight.layer}, {weight.module}[{weight.row}, {weight.column}] = "
            f"{_number(weight.weight)} turns {_number(weight.input)} into {_number(weight.output)}"
        )
    if report.bos and report.bos.outlier_dims:
        dims = report.bos.outlier_dims
        shown = ", ".join(map(str, dims[:8])) + (f" and {len(dims) - 8} more" if len(dims) > 8 else "")
        console.out(f"First tokens, counted apart: up to {_number(report.bos.absmax)}, outliers in {shown}.")
    if report.attention:
        console.out(f"Attention sinks: {_percent(report.attention.sink_share)} of the heads give the first token over 30%.")
    console.out()


def _ablation(report: Inspection) -> None:
    found = report.ablation
    if found is None:
        return
    top1, perplexity = found.top1, found.perplexity
    rows = [("nothing", *_ablated(top1, "with", perplexity, "whole"))]
    rows.append((f"the outlier features {_dims(found.dims)}", *_ablated(top1, "without", perplexity, "without")))
    rows.append((f"as many others {_dims(found.random_dims)}", *_ablated(top1, "random", perplexity, "random")))
    console.table("zeroed at the inputs of attention and FFN", ("", "top-1 attention p", "perplexity", "change"), rows)
    console.out("top-1 attention p: zeroed in one layer at a time. perplexity: zeroed in all layers.")
    console.out()


def _ablated(top1: dict[str, float] | None, name: str, perplexity: dict[str, float | None], variant: str) -> tuple:
    shown, whole, found = "", perplexity["whole"], perplexity[variant]
    if variant != "whole" and whole is not None and found is not None:
        shown = f"{found / whole - 1:+,.1%}"
    return _percent(top1 and top1[name], 1), _number(found), shown


def _dims(dims: list[int]) -> str:
    return ", ".join(map(str, dims[:8])) + (", ..." if len(dims) > 8 else "")


def _recommendation(report: Inspection) -> None:
    found = report.recommendation
    if found is None:
        return
    console.out("Recommendation")
    for sentence in found.why:
        console.out(f"  {sentence}")
    console.out(f"next: {found.command}")
    console.out(f"  or: {found.alternative}")


def rows(report: Inspection) -> tuple[list[str], list[list]]:
    """(columns, a row for each site and each residual stream) for CSV."""
    plain = (
        "rows",
        "channels",
        "absmax",
        "rms",
        "crest",
        "kurtosis",
        "channel_ratio",
        "token_ratio",
        "outlier_columns",
        "outlier_share",
    )
    methods = list(dict.fromkeys(name for _, site in _each(report) for name in site.sqnr or ()))
    columns = ["layer", "site", "modules", *plain, "outlier_dims", "columns_kept"]
    columns += [f"sqnr {name}{part}" for name in methods for part in ("", ", ordinary channels")]
    found = []
    for layer in report.layers:
        for site in layer.sites:
            sqnr = [site.sqnr.get(name) if site.sqnr else None for name in methods]
            last = [site.columns_kept, *(value for one in sqnr for value in ((one.output, one.ordinary) if one else (None, None)))]
            found.append(_row(layer.layer, site.kind, site.modules, site, plain) + last)
        if layer.residual:
            found.append(_row(layer.layer, "residual stream", [], layer.residual, plain) + [None] * (1 + 2 * len(methods)))
    return columns, found


def _row(layer: int, kind: str, modules: list[str], found: Activations, plain: tuple[str, ...]) -> list:
    dims = " ".join(str(d.dim) for d in found.dims)
    return [layer, kind, " ".join(modules), *(getattr(found, name) for name in plain), dims]


def _each(report: Inspection) -> Iterator[tuple[Layer, Site]]:
    return ((layer, site) for layer in report.layers for site in layer.sites)


def _number(value: float | None) -> str:
    """Three significant figures, in full above, up to a million."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _percent(value: float | None, digits: int = 0) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.2g}%" if 0 < abs(value) < 0.01 else f"{value:.{digits}%}"


def _pair(sqnr: Sqnr) -> str:
    return " / ".join("-" if value is None else f"{value:.1f}" for value in (sqnr.output, sqnr.ordinary))


def _quartiles(values: list[float] | None) -> str:
    return "-" if values is None else f"({', '.join(f'{v:.0f}' for v in values)})"


def _count(parameters: int | None) -> str | None:
    if parameters is None:
        return None
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if parameters >= size:
            return f"{parameters / size:.3g}{unit}"
    return str(parameters)
