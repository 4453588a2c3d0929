"""Findings on single weights and norms put together: by kind, by dimension, in notes, and as rows of a CSV file."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from statistics import median

from qcli.methods.errors import ErrorSums
from qcli.outliers.weights.inspection import (
    Beyond,
    DimShare,
    KindFinding,
    LinearFinding,
    NormDim,
    NormFinding,
    SuperWeightCandidate,
    WeightInspection,
)
from qcli.outliers.weights.statistics import METHODS, LinearWeight

MOST = 0.5  # share of the norms beyond which a dimension is a candidate for an outlier feature
_LISTED_OF_ALL = 64  # dims at most
_LISTED = 16  # of one tensor, of one kind

_COLUMNS = (
    "tensor",
    "type",
    "layer",
    "kind",
    "rows",
    "columns",
    "dtype",
    "quantized",
    "nonfinite",
    "absmax",
    "rms",
    "crest",
    "kurtosis",
    "row_spread",
    "row_crest",
    "block_spread",
    "sqnr_llm_int8_db",
    "sqnr_nf4_db",
    "mean",
    "std",
    "max_z",
    "dims_beyond",
    "dims",
)


def kinds(weights: list[LinearWeight]) -> list[KindFinding]:
    """One for each kind of linear module, in the order of the first."""
    groups: dict[str, list[LinearWeight]] = {}
    for weight in weights:
        groups.setdefault(weight.finding.kind, []).append(weight)
    return [_kind(kind, group) for kind, group in groups.items()]


def _kind(kind: str, group: list[LinearWeight]) -> KindFinding:
    finite = [w.finding for w in group if not w.finding.nonfinite]

    def values(name: str) -> list[float]:
        return [value for found in finite if (value := getattr(found, name)) is not None]

    def middle(name: str) -> float | None:
        return median(values(name)) if values(name) else None

    def together(label: str) -> float | None:
        sums = [w.errors[label] for w in group if not w.finding.nonfinite]
        return ErrorSums(sum(s.squared_error for s in sums), sum(s.squared_norm for s in sums)).sqnr

    dims = Counter(d.dim for found in finite if found.columns for d in found.columns.dims)
    return KindFinding(
        kind=kind,
        weights=len(group),
        parameters=sum(w.info.numel for w in group),
        quantized=group[0].finding.quantized,
        absmax=max(values("absmax"), default=None),
        median_crest=middle("crest"),
        median_kurtosis=middle("kurtosis"),
        worst_row_spread=max(values("row_spread"), default=None),
        worst_block_spread=max(values("block_spread"), default=None),
        worst_kurtosis=max(values("kurtosis"), default=None),
        sqnr={label: together(label) for label in METHODS},
        column_dims=[DimShare(dim, n / len(finite)) for dim, n in _most_common(dims, _LISTED)],
    )


def norm_dims(norms: list[NormFinding]) -> list[NormDim]:
    """The dims beyond 3 standard deviations in any norm, by how common they are among the norms of the same width."""
    widths: dict[int, list[NormFinding]] = {}
    for norm in norms:
        if not norm.nonfinite:
            widths.setdefault(norm.channels, []).append(norm)
    found = []
    for channels, group in widths.items():
        count = Counter(d.dim for norm in group for d in norm.dims)
        greatest: dict[int, float] = {}
        for norm in group:
            for d in norm.dims:
                greatest[d.dim] = max(greatest.get(d.dim, 0.0), d.z)
        for dim, n in _most_common(count, _LISTED_OF_ALL):
            share = n / len(group)
            candidate = share > MOST and len(group) > 1
            found.append(NormDim(channels, dim, n, len(group), share, greatest[dim], candidate))
    return found


def _most_common(count: Counter, limit: int) -> list[tuple[int, int]]:
    return sorted(count.items(), key=lambda item: (-item[1], item[0]))[:limit]


def super_weights(linears: list[LinearFinding]) -> list[SuperWeightCandidate]:
    """The weights that stand out in down projections of early layers."""
    return [
        SuperWeightCandidate(**asdict(weight), layer=linear.layer, module=linear.module)
        for linear in linears
        for weight in linear.largest or ()
    ]


def nonfinite_notes(findings: Iterable[LinearFinding | NormFinding]) -> list[str]:
    """A sentence for each tensor with NaN or infinity."""
    return [
        f"{found.tensor} holds {found.nonfinite:,} NaN or infinite values: nothing else of it was measured"
        for found in findings
        if found.nonfinite
    ]


def shortened(linear: LinearFinding) -> LinearFinding:
    """The same with only the columns that are furthest out."""
    columns = linear.columns
    return replace(linear, columns=columns and replace(columns, dims=columns.dims[:_LISTED]))


def shortened_norm(norm: NormFinding) -> NormFinding:
    """The same with only the dims that are furthest out."""
    return replace(norm, dims=norm.dims[:_LISTED])


def rows(report: WeightInspection) -> tuple[tuple[str, ...], list[list[object]]]:
    """(columns, rows) of a CSV file: a row for each linear weight and each norm gain, None where a column does not apply."""
    table = []
    for linear in report.linears:
        columns = linear.columns or Beyond(0, None, [])
        table.append(
            vars(linear)
            | {
                "type": "linear",
                "rows": linear.out_features,
                "columns": linear.in_features,
                "max_z": columns.max_z,
                "sqnr_llm_int8_db": linear.sqnr["llm-int8"],
                "sqnr_nf4_db": linear.sqnr["nf4"],
                "dims_beyond": columns.beyond if linear.columns else None,
                "dims": columns.dims,
            }
        )
    table += [vars(norm) | {"type": "norm", "columns": norm.channels, "dims_beyond": norm.beyond} for norm in report.norms]
    for row in table:
        row["dims"] = " ".join(str(d.dim) for d in row["dims"])
    return _COLUMNS, [[row.get(column) for column in _COLUMNS] for row in table]
