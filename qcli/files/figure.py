"""Writes static figures: the formats, the style, and bytes that depend on the figure alone."""

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
    """Raises UsageError or QcliError if no figure can be written to `path`. Called before hours of measuring."""
    if path.suffix.lower() not in FORMATS:
        found = f"not {path.suffix}" if path.suffix else "but this name has no suffix"
        raise UsageError(f"{path}: a figure is written as {', '.join(FORMATS)}, {found}")
    if importlib.util.find_spec("matplotlib") is None:
        raise QcliError("The figure needs matplotlib, which is not installed.", "pip install 'qcli[plot]'")
    check_place(path)


@contextmanager
def figure(path: Path, width: float, height: float):
    """A matplotlib Figure of `width` x `height` inches at 100 dots per inch. At the end it is written to `path`, whole or not at
    all."""
    check(path)
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", _SETTINGS]):  # independent of the user's own style
        made = Figure(figsize=(width, height), dpi=100, layout="constrained")  # no window system, no global state
        made.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
        yield made
        drawn = io.BytesIO()
        kind = path.suffix.lower()[1:]
        undated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}  # the same report gives the same bytes
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # the figure shows a box instead
            made.savefig(drawn, format=kind, metadata=undated[kind])
    write_whole(path, drawn.getvalue())


def printable(name: str) -> str:
    """A name for fonts and XML: control characters and halves of surrogate pairs are replaced."""
    return "".join(character if character.isprintable() else "\ufffd" for character in name)
