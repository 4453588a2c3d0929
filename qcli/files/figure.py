"""A static figure on its way to a file: which formats there are, the style, and bytes that depend on nothing but the figure."""

import importlib.util
import io
import warnings
from contextlib import contextmanager
from pathlib import Path

from qcli.errors import QcliError, UsageError
from qcli.files.whole import check_place, write_whole

FORMATS = (".png", ".svg", ".pdf")
_SETTINGS = {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "qcli", "svg.fonttype": "none"}


def check(path: Path) -> None:
    """Raises UsageError or QcliError where no figure could be written to `path`: to be known before hours of measuring."""
    if path.suffix.lower() not in FORMATS:
        found = f"not {path.suffix}" if path.suffix else "and this name has no suffix"
        raise UsageError(f"{path}: a figure is written as {', '.join(FORMATS)}, {found}")
    if importlib.util.find_spec("matplotlib") is None:
        raise QcliError("The figure needs matplotlib, which is not installed.", "pip install 'qcli[plot]'")
    check_place(path)


@contextmanager
def figure(path: Path, width: float, height: float):
    """A matplotlib Figure of `width` x `height` inches at 100 dots each, written to `path` at the end, whole or not at all."""
    check(path)
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", _SETTINGS]):  # whatever the user's own style is
        made = Figure(figsize=(width, height), dpi=100, layout="constrained")  # no window system, no global state
        made.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
        yield made
        drawn = io.BytesIO()
        kind = path.suffix.lower()[1:]
        undated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}  # the same report, the same bytes
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # the picture shows a box for it
            made.savefig(drawn, format=kind, metadata=undated[kind])
    write_whole(path, drawn.getvalue())


def printable(name: str) -> str:
    """Of a name what fonts and XML can hold: neither control characters nor halves of surrogate pairs."""
    return "".join(character if character.isprintable() else "\ufffd" for character in name)
