"""Which method, threshold and modules the measurements recommend. Every sentence gives the numbers that it follows from."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from qcli.calibration.reported_columns import HINT, read_report
from qcli.errors import UsageError
from qcli.outliers import paper
from qcli.outliers.damage import Damage
from qcli.outliers.features import Feature
from qcli.outliers.measured import LayerMeasure, SiteMeasure
from qcli.outliers.sites import FFN_OUTPUT

GOOD = 25.0  # dB through ordinary channels: below it int8 without decomposition costs perplexity
MOST_COLUMNS = 0.10  # of the input columns in 16 bits: with more, the decomposition costs more time than int8 saves
WORSE = 10.0  # dB below the median of its kind: such a module is kept in 16 bits
MOST_SKIPPED = 0.10  # of the modules, the worst ones


@dataclass(frozen=True)
class Recommendation:
    """`method` is a name of qcli.schemes, `command` is ready to run, `alternative` is the command for the other width. `skip` are
    full module names. `threshold` is None where the method has none."""

    method: str
    threshold: float | None
    skip: list[str]
    command: str
    alternative: str
    why: list[str]


def recommend(
    model: str, layers: Sequence[LayerMeasure], features: Sequence[Feature], threshold: float, loading: Sequence[str] = ()
) -> Recommendation | None:
    """None where there is nothing to quantize, since no damage was measured. `loading` are the options that opened the model."""
    measured = [(layer, site) for layer in layers for site in layer.sites if site.damage]
    if not measured:
        return None
    sites = [site for _, site in measured]
    plain = _median(sites, "int8")
    nf4 = _median(sites, "nf4")
    share = sum(site.share_kept * len(site.modules) for site in sites) / sum(len(s.modules) for s in sites)
    why = [_about_features(features), _about_rounding(sites, plain)]
    if share <= MOST_COLUMNS:
        method, left = "llm-int8", _median(sites, "llm-int8")
        leaves = "" if left is None else f", and leaves {left:.1f} dB"
        why.append(
            f"LLM.int8() keeps {share:.1%} of the input columns of a sequence in 16 bits{leaves}."
            if share
            else f"No column of a sequence reaches {threshold:g}, so LLM.int8() is plain int8 here and costs no more."
        )
    else:
        method = "nf4"
        why.append(
            f"LLM.int8() would keep {share:.0%} of the input columns of a sequence in 16 bits, which costs more than int8 saves; "
            f"NF4 leaves activations whole. A higher --threshold keeps fewer: try {2 * threshold:g}."
        )
    why.append(f"NF4 rounds weights only and leaves {nf4:.1f} dB, whatever the outliers are." if nf4 else "")
    skip, about_skip = _skip(measured, method)
    why += about_skip
    options = [] if threshold == paper.THRESHOLD or method == "nf4" else ["--threshold", f"{threshold:g}"]
    skips = [part for module in skip for part in ("--skip", module)]
    bits = "8" if method == "llm-int8" else "4"
    command = ["qcli", "quantize", model, "--bits", bits, *options, *skips, *loading]
    other = ["qcli", "quantize", model, "--bits", "4" if bits == "8" else "8", *skips, *loading]
    return Recommendation(
        method, threshold if method == "llm-int8" else None, skip, shlex.join(command), shlex.join(other), [s for s in why if s]
    )


def read_skip(path: Path) -> list[str]:
    """The modules that a report of `qcli inspect-outliers --json` recommends to keep in 16 bits.

    Raises UsageError.
    """
    recommendation = read_report(path).get("recommendation")
    if recommendation is None:
        raise UsageError(f"{path} holds no recommendation: its model was quantized already", HINT)
    skip = recommendation.get("skip") if isinstance(recommendation, dict) else None
    if not isinstance(skip, list) or not all(isinstance(module, str) for module in skip):
        raise UsageError(f"{path}: its recommendation has no list of modules to skip", HINT)
    return skip


def _median(sites: Sequence[SiteMeasure], method: str) -> float | None:
    values = [d.ordinary for site in sites if (d := site.damage.get(method)) and d.ordinary is not None]
    return median(values) if values else None


def _about_features(features: Sequence[Feature]) -> str:
    outliers = [f for f in features if f.outlier]
    if not outliers:
        return "No dimension meets the paper's criteria of an outlier feature."
    shown = ", ".join(str(f.dim) for f in outliers[:8]) + (", ..." if len(outliers) > 8 else "")
    top = max(outliers, key=lambda f: f.positions_share)
    few = len(outliers) == 1
    return (
        f"{len(outliers)} outlier feature{'' if few else 's'} ({shown}), the most common in {top.layers_share:.0%} of the layers "
        f"at {top.positions_share:.0%} of the positions."
    )


def _about_rounding(sites: Sequence[SiteMeasure], plain: float | None) -> str:
    if plain is None:
        return ""
    worst = min(sites, key=lambda s: _ordinary(s.damage["int8"]))
    lowest = _ordinary(worst.damage["int8"])
    verdict = "too little" if plain < GOOD else "enough"
    place = f"; least at {worst.kind}s, {lowest:.1f} dB" if lowest < plain - 3 else ""
    return (
        f"int8 without decomposition leaves {plain:.1f} dB (median) of what comes through ordinary channels{place}: {verdict} "
        f"against {GOOD:g} dB."
    )


def _ordinary(damage: Damage) -> float:
    return float("inf") if damage.ordinary is None else damage.ordinary


def _skip(measured: Sequence[tuple[LayerMeasure, SiteMeasure]], method: str) -> tuple[list[str], list[str]]:
    """(modules to keep in 16 bits, reasons): those with super weights, and those far below others of their kind."""
    why, skip = [], []
    for layer, site in measured:
        for weight in layer.super_weights if site.kind == FFN_OUTPUT else ():
            if (name := f"{layer.name}.{weight.module}") not in skip:
                skip.append(name)
                why.append(f"{name} holds a super weight, [{weight.row}, {weight.column}] = {weight.weight:.3g}.")
    kinds: dict[str, list[tuple[float, str]]] = {}
    for layer, site in measured:
        value = _ordinary(site.damage[method])
        kinds.setdefault(site.kind, []).extend((value, f"{layer.name}.{module}") for module in site.modules)
    far = []
    for kind, found in kinds.items():
        middle = median(value for value, _ in found)
        far += [(value - middle, name, kind, value, middle) for value, name in found if value < middle - WORSE]
    for _, name, kind, value, middle in sorted(far)[: int(MOST_SKIPPED * sum(map(len, kinds.values())))]:
        if name not in skip and "*" not in name:
            skip.append(name)
            why.append(f"{name} is left with {value:.1f} dB under {method}, where the median {kind} has {middle:.1f}.")
    return skip, why
