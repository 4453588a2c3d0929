"""The report as one static figure, for a paper or an issue: four panels by matplotlib."""

import math
from pathlib import Path

from qcli.files import figure as figure_file
from qcli.files.figure import printable
from qcli.outliers.heatmap import worth_showing

_KINDS = {
    "attention input": "#1b6db3",
    "attention output": "#7b4fa3",
    "ffn input": "#c8781a",
    "ffn output": "#2b8257",
    "other": "#7d868e",
}
_METHODS = {
    "int8-per-tensor": ("#8a5a36", "x"),
    "int8-row-wise": ("#c8781a", "^"),
    "int8": ("#b83a4b", "s"),
    "llm-int8": ("#1b6db3", "o"),
    "nf4": ("#2b8257", "D"),
}
_BELOW = ("#f3f4f5", "#b4bdc5")  # the threshold
_ABOVE = ("#f0b27a", "#b3361f", "#3d0b1f")
_MOST_DIMS = 12  # in the panel of quartiles


def draw(report: dict, path: Path) -> None:
    """Draws `Inspection.summary()` to `path`: PNG of 1600 x 1200 pixels, SVG or PDF, by the suffix.

    The file is written whole or not at all. Raises UsageError for another suffix, QcliError where matplotlib is not
    installed or the file cannot be written.
    """
    with figure_file.figure(path, 16, 12) as figure:
        model, text = report["model"], report["text"]
        outliers = f"{report['table4']['outliers']} of {model['hidden_size']} dimensions"
        figure.suptitle(
            f"Outlier features of {printable(model['name'])}: {outliers}\n"
            f"{text['tokens']:,} positions of {printable(text['name'])}, threshold {report['threshold']:g}",
            fontsize=16,
            parse_math=False,  # a name may hold a dollar sign
        )
        panels = figure.subplots(2, 2)
        _heatmap(figure, panels[0, 0], report)
        _kurtosis(panels[0, 1], report)
        _noise(panels[1, 0], report)
        _quartiles(panels[1, 1], report)


def _heatmap(figure, panel, report: dict) -> None:
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    threshold = report["threshold"]
    chart = worth_showing(report["charts"]["heatmap"], threshold)
    if chart is None:
        return _sentence(panel, "Absmax by layer and dimension", f"no dimension reaches {threshold:g}")
    dims = chart["dims"]
    low = threshold / 20
    values = [[max(layer[d], low) for layer in chart["absmax"]] for d in range(len(dims))]
    high = max(max(map(max, values)), 1.1 * threshold)
    at = math.log(threshold / low) / math.log(high / low)
    shades = [(0, _BELOW[0]), (at, _BELOW[1]), (at, _ABOVE[0]), (at + 0.6 * (1 - at), _ABOVE[1]), (1, _ABOVE[2])]
    colours = LinearSegmentedColormap.from_list("threshold", shades, N=1024)
    first, last = chart["layers"][0], chart["layers"][-1]
    shown = panel.imshow(
        values,
        aspect="auto",
        interpolation="nearest",
        cmap=colours,
        norm=LogNorm(low, high),
        extent=(first - 0.5, last + 0.5, len(dims) - 0.5, -0.5),
    )
    every = math.ceil(len(dims) / 24)
    panel.set_yticks(range(0, len(dims), every), [str(dim) for dim in dims[::every]])
    steps = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
    bar = figure.colorbar(shown, ax=panel, ticks=[step for step in steps if low <= step <= high], format="%g")
    bar.ax.minorticks_off()
    bar.set_label("absmax (log)")
    _layers(panel, report)
    panel.set(title=f"Absmax of the {chart['kind']}; coloured from {threshold:g}", ylabel="dimension")


def _kurtosis(panel, report: dict) -> None:
    layers = [layer["layer"] for layer in report["layers"]]
    for kind, colour in _KINDS.items():
        values = _worst(report, kind, lambda site: site["kurtosis"], max)
        if any(value is not None for value in values):
            panel.plot(layers, _gaps(values), color=colour, label=kind, **_marker(layers, "o"))
    panel.axhline(3, color="black", linewidth=1, linestyle="--", label="Gaussian")
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    panel.set_ylim(min(low, 2), max(high, 10))
    _plain_ticks(panel)
    _layers(panel, report)
    panel.set(title="Kurtosis of each site", ylabel="kurtosis (log)")
    panel.legend(frameon=False, fontsize=11)


def _noise(panel, report: dict) -> None:
    layers = [layer["layer"] for layer in report["layers"]]
    sites = [site for layer in report["layers"] for site in layer["sites"] if site["sqnr"]]
    if not sites:
        return _sentence(panel, "SQNR by method", "not measured in this run")
    kind = next(kind for kind in _KINDS if any(site["kind"] == kind for site in sites))
    for method, (colour, symbol) in _METHODS.items():
        values = _worst(report, kind, lambda site: (site["sqnr"] or {}).get(method, {}).get("ordinary"), min)  # noqa: B023
        if any(value is not None for value in values):
            band = {"linewidth": 6, "alpha": 0.6} if method == "int8-row-wise" else {}  # int8 often coincides with it
            panel.plot(layers, _gaps(values), color=colour, label=method, **_marker(layers, symbol) | band)
    _layers(panel, report)
    panel.set(title=f"SQNR through ordinary channels, {kind}", ylabel="SQNR at the output (dB)")
    panel.set_ylim(bottom=min(0, panel.get_ylim()[0]))
    panel.legend(frameon=False, fontsize=11, ncols=2)


def _quartiles(panel, report: dict) -> None:
    features = [feature for feature in report["features"] if feature["quartiles"]][:_MOST_DIMS]
    title = f"Values at or above {report['threshold']:g} in magnitude"
    if not features:
        return _sentence(panel, title, f"no dimension reaches {report['threshold']:g}")
    for row, feature in enumerate(features):
        low, median, high = feature["quartiles"]
        colour = _KINDS["attention input"] if feature["outlier"] else _KINDS["other"]
        panel.barh(row, high - low, left=low, height=0.6, color=colour, alpha=0.55)
        panel.plot([median, median], [row - 0.3, row + 0.3], color=colour, linewidth=3)
    for edge in (-report["threshold"], report["threshold"]):
        panel.axvline(edge, color="black", linewidth=1, linestyle="--")
    panel.axvline(0, color="black", linewidth=0.8)
    panel.use_sticky_edges = False
    panel.margins(x=0.06)
    panel.set_yticks(range(len(features)), [str(feature["dim"]) for feature in features])
    panel.invert_yaxis()
    panel.set(title=title, xlabel="value: median and quartiles; grey: no outlier feature", ylabel="dimension")


def _worst(report: dict, kind: str, value, take) -> list[float | None]:
    """A number for each layer: the worst of its sites of a kind; None where it has none."""
    found = [[value(site) for site in layer["sites"] if site["kind"] == kind] for layer in report["layers"]]
    return [take((number for number in numbers if number is not None), default=None) for numbers in found]


def _gaps(values: list[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _marker(layers: list[int], symbol: str) -> dict[str, object]:
    return {"linewidth": 1.6} if len(layers) > 60 else {"linewidth": 1.8, "marker": symbol, "markersize": 6}


def _layers(panel, report: dict) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panel.set_xlim(report["layers"][0]["layer"] - 0.5, report["layers"][-1]["layer"] + 0.5)
    panel.set_xlabel("layer")


def _plain_ticks(panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _sentence(panel, title: str, sentence: str) -> None:
    panel.set_title(title)
    panel.set_axis_off()
    panel.text(0.5, 0.5, sentence[0].upper() + sentence[1:] + ".", ha="center", va="center", transform=panel.transAxes)
