"""The rows of a benchmark: figures, and ratios with their required values, as tables and as a file."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from qcli import console

RESULTS = Path(__file__).parent / "results"


@dataclass
class Row:
    """One line of the table: `figures` are times or rates by name, `ratios` are comparisons with their required values."""

    work: str
    figures: dict[str, float]
    ratios: list[dict[str, object]] = field(default_factory=list)

    def compare(self, what: str, found: float, must: float | None, aim: float | None = None, *, at_most: bool = False) -> "Row":
        """Adds a ratio, which must be at least `must`, or at most if `at_most`. With None it is only shown."""
        met = must is None or (found <= must if at_most else found >= must)
        bound = "" if must is None else f"{'<=' if at_most else '>='} {must:g}"
        self.ratios.append({"what": what, "found": found, "must": bound, "aim": aim, "met": met})
        return self


def show(rows: list[Row], unit: str) -> None:
    """Prints the rows as two tables: figures, and ratios."""
    console.table(
        "",
        ("work", unit),
        [(row.work, ", ".join(f"{name} {value:.4g}" for name, value in row.figures.items())) for row in rows],
        left=(0, 1),
    )
    show_ratios([(row, ratio) for row in rows for ratio in row.ratios])


def show_ratios(ratios: list[tuple[Row, dict[str, object]]]) -> None:
    """Prints ratios with their required values and aims."""
    if ratios:
        console.table(
            "",
            ("work", "ratio", "found", "must", "aim", ""),
            [
                (row.work, r["what"], f"{r['found']:.2f}", r["must"], r["aim"] or "", "" if r["met"] else "falls short")
                for row, r in ratios
            ],
            left=(0, 1, 5),
        )


def result_path(prefix: str, name: str) -> Path:
    """benchmarks/results/PREFIX-NAME.json. `name` is the device's, or a model's."""
    name = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "")).strip("-")
    return RESULTS / f"{prefix}-{name}.json"


def save(prefix: str, name: str, result: dict[str, object]) -> Path:
    """Writes that file and returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = result_path(prefix, name)
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path
