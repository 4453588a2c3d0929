"""What the findings on single weights and norms come to: by kind, by dimension, in notes, and as rows of a CSV file."""

from collections import Counter
from statistics import median

from qcli.methods.errors import ErrorSums
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


def kinds(weights: list[LinearWeight]) -> list[dict[str, object]]:
    """One dict per kind of linear module, in the order of the first: see `inspect_weights`."""
    groups: dict[str, list[LinearWeight]] = {}
    for weight in weights:
        groups.setdefault(weight.finding["kind"], []).append(weight)
    return [_kind(kind, group) for kind, group in groups.items()]


def _kind(kind: str, group: list[LinearWeight]) -> dict[str, object]:
    whole = [w.finding for w in group if not w.finding["nonfinite"]]

    def values(name: str) -> list[float]:
        return [f[name] for f in whole if f[name] is not None]

    def together(label: str) -> float | None:
        sums = [w.errors[label] for w in group if not w.finding["nonfinite"]]
        return ErrorSums(sum(s.squared_error for s in sums), sum(s.squared_norm for s in sums)).sqnr

    dims = Counter(d["dim"] for f in whole for d in f["columns"]["dims"])
    return {
        "kind": kind,
        "weights": len(group),
        "parameters": sum(w.info.numel for w in group),
        "quantized": group[0].finding["quantized"],
        "absmax": max(values("absmax"), default=None),
        **{f"median_{name}": median(values(name)) if values(name) else None for name in ("crest", "kurtosis")},
        **{f"worst_{name}": max(values(name), default=None) for name in ("row_spread", "block_spread", "kurtosis")},
        "sqnr": {label: together(label) for label in METHODS},
        "column_dims": [{"dim": dim, "share": n / len(whole)} for dim, n in _most_common(dims, _LISTED)],
    }


def norm_dims(norms: list[dict]) -> list[dict[str, object]]:
    """The dims beyond 3 standard deviations in any norm, by how common they are among the norms of the same width."""
    widths: dict[int, list[dict]] = {}
    for norm in norms:
        if not norm["nonfinite"]:
            widths.setdefault(norm["channels"], []).append(norm)
    found = []
    for channels, group in widths.items():
        count = Counter(d["dim"] for norm in group for d in norm["dims"])
        greatest: dict[int, float] = {}
        for norm in group:
            for d in norm["dims"]:
                greatest[d["dim"]] = max(greatest.get(d["dim"], 0.0), d["z"])
        for dim, n in _most_common(count, _LISTED_OF_ALL):
            share = n / len(group)
            candidate = share > MOST and len(group) > 1
            found.append(
                {
                    "channels": channels,
                    "dim": dim,
                    "norms": n,
                    "of": len(group),
                    "share": share,
                    "max_z": greatest[dim],
                    "candidate": candidate,
                }
            )
    return found


def _most_common(count: Counter, limit: int) -> list[tuple[int, int]]:
    return sorted(count.items(), key=lambda item: (-item[1], item[0]))[:limit]


def super_weights(linears: list[dict]) -> list[dict[str, object]]:
    """The weights that stand out in down projections of early layers."""
    return [
        {"layer": linear["layer"], "module": linear["module"], **weight} for linear in linears for weight in linear["largest"] or ()
    ]


def nonfinite_notes(findings: list[dict]) -> list[str]:
    """A sentence for each tensor with NaN or infinity."""
    return [
        f"{found['tensor']} holds {found['nonfinite']:,} NaN or infinite values: nothing else of it was measured"
        for found in findings
        if found["nonfinite"]
    ]


def shorten_dims(report: dict) -> None:
    """Keeps, of each tensor, the dims that are furthest out."""
    for found in report["norms"] + [linear["columns"] for linear in report["linears"] if linear["columns"]]:
        del found["dims"][_LISTED:]


def rows(report: dict) -> tuple[tuple[str, ...], list[list[object]]]:
    """(columns, rows) of a CSV file: a row per linear weight and per norm gain; what does not apply is None."""
    table = []
    for found in report["linears"]:
        columns = found["columns"] or {"max_z": None, "beyond": None, "dims": []}
        table.append(
            found
            | {
                "type": "linear",
                "rows": found["out_features"],
                "columns": found["in_features"],
                "max_z": columns["max_z"],
                "sqnr_llm_int8_db": found["sqnr"]["llm-int8"],
                "sqnr_nf4_db": found["sqnr"]["nf4"],
                "dims_beyond": columns["beyond"],
                "dims": columns["dims"],
            }
        )
    for found in report["norms"]:
        table.append(found | {"type": "norm", "columns": found["channels"], "dims_beyond": found["beyond"]})
    for row in table:
        row["dims"] = " ".join(str(d["dim"]) for d in row["dims"])
    return _COLUMNS, [[row.get(column) for column in _COLUMNS] for row in table]
