"""The report as one HTML page that needs no network. Markup, style, scripts, plotly.js and the data are in one file."""

import html
import importlib.util
import json
import re
from importlib import resources

from qcli.errors import QcliError
from qcli.outliers.heatmap import worth_showing

# One script: each file may use what those before it define.
_SCRIPTS = ("document.js", "plot.js", "paper.js", "where.js", "layers.js", "simulation.js", "simulation_view.js", "page.js")


def check() -> None:
    """Raises QcliError where `page` could not work. Called before hours of measuring."""
    if importlib.util.find_spec("plotly") is None:
        raise QcliError("The HTML report needs plotly, which is not installed.", "pip install 'qcli[plot]'")


def page(report: dict) -> str:
    """The HTML page of `Inspection.summary()`, about 5 MB, most of it plotly.js.

    No text of the report is ever read as markup or script, whatever a token or a name holds. Raises QcliError where plotly is not
    installed, and ValueError where the report holds NaN or infinity.
    """
    check()
    from plotly.offline import get_plotlyjs

    charts = report["charts"]
    report = report | {"charts": charts | {"heatmap": worth_showing(charts["heatmap"], report["threshold"])}}
    # ASCII, so that a lone surrogate of a broken token stays an escape.
    data = json.dumps(_lean(report), allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    parts = {
        "title": html.escape(f"Outliers of {report['model']['name']}").encode("ascii", "xmlcharrefreplace").decode(),
        "style": _asset("page.css"),
        "plotly": get_plotlyjs(),
        "report": data,
        "script": '"use strict";\n' + "\n".join(_asset(name) for name in _SCRIPTS),
    }
    # One pass, so that no part is searched for the names of other parts.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("page.html"))


def _lean(value: object) -> object:
    """Each float in six digits, and only what the page shows of a site's dims. This makes a deep model's page a third smaller."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [_lean(item) for item in value]
    if not isinstance(value, dict):
        return value
    lean = {key: _lean(item) for key, item in value.items()}
    if "modules" in lean:  # a site
        lean["dims"] = [{key: dim[key] for key in ("dim", "absmax", "share")} for dim in lean["dims"]]
    return lean


def _asset(name: str) -> str:
    return resources.files("qcli.outliers").joinpath("assets", name).read_text(encoding="utf-8")
