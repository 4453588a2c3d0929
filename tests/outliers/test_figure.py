"""The static figure: what it shows, in which formats, and files that are whole or not there."""

import errno
import os
import sys
import warnings
from xml.etree import ElementTree

import pytest

from qcli.errors import QcliError, UsageError
from qcli.outliers.figure import draw
from tests.outliers.reports import demo_report

matplotlib = pytest.importorskip("matplotlib")


def texts(report, folder) -> list[str]:
    """Every text of the figure, in the order drawn."""
    file = folder / "figure.svg"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(report, file)
    return ["".join(item.itertext()) for item in ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}text")]


def test_png_has_the_size_it_says_and_is_not_empty(tmp_path):
    draw(demo_report(), tmp_path / "figure.PNG")
    image = matplotlib.image.imread(tmp_path / "figure.PNG", format="png")
    assert image.shape[:2] == (1200, 1600)
    panels = image[100:580, :780], image[100:580, 820:], image[640:, :780], image[640:, 820:]
    assert all(panel[..., :3].std() > 0.02 for panel in panels)


@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_same_report_gives_the_same_bytes(tmp_path, suffix, start):
    for name in ("one", "two"):
        draw(demo_report(), tmp_path / f"{name}.{suffix}")
    one, two = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("one", "two"))
    assert one.startswith(start) and one == two


def test_the_four_panels(tmp_path):
    shown = texts(demo_report(), tmp_path)
    assert "Outlier features of demo-model: 3 of 128 dimensions" in shown[-1] + shown[-2]
    assert {"Absmax of the attention input; coloured from 6", "Kurtosis of each site"} <= set(shown)
    assert {"SQNR through ordinary channels, attention input", "Values at or above 6 in magnitude"} <= set(shown)
    assert {"attention input", "attention output", "ffn input", "ffn output", "Gaussian"} <= set(shown)
    assert {"int8-per-tensor", "int8-row-wise", "int8", "llm-int8", "nf4"} <= set(shown)
    assert shown.count("52") == 2  # a row of the heatmap and of the quartiles


def test_what_there_is_not_is_said(tmp_path):
    shown = texts(demo_report(outliers=False, optional=False), tmp_path)
    assert shown.count("No dimension reaches 6.") == 2
    assert shown.count("Not measured in this run.") == 1


@pytest.mark.parametrize("options", [{"layers": 1}, {"layers": 300}, {"kinds": ("ffn output",)}], ids=str)
def test_any_depth_and_any_sites(tmp_path, options):
    shown = texts(demo_report(**options), tmp_path)
    assert ("attention output" in shown) == ("kinds" not in options)


@pytest.mark.parametrize(
    ("name", "shown"), [("$x^2$ <b>", "$x^2$ <b>"), ("\u6a21\u578b", "\u6a21\u578b"), ("a\x07\udc80", "a\ufffd\ufffd")]
)
def test_any_name_can_be_drawn(tmp_path, name, shown):
    assert any(f"of {shown}: 3" in text for text in texts(demo_report(name=name), tmp_path))
    draw(demo_report(name=name), tmp_path / "figure.png")


@pytest.mark.parametrize(("name", "found"), [("figure.jpg", "not .jpg"), ("figure", "no suffix")])
def test_another_suffix_is_named(tmp_path, name, found):
    with pytest.raises(UsageError, match=found) as caught:
        draw(demo_report(), tmp_path / name)
    assert ".png, .svg, .pdf" in caught.value.message


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(QcliError) as caught:
        draw(demo_report(), tmp_path / "none" / "figure.png")
    assert str(tmp_path / "none") in caught.value.message
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(QcliError, match="is a folder"):
        draw(demo_report(), tmp_path / "folder.png")


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "figure.png"
    file.write_text("before")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QcliError, match="figure.png cannot be written: No space left on device"):
        draw(demo_report(), file)
    assert file.read_text() == "before"
    assert os.listdir(tmp_path) == ["figure.png"]


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(QcliError) as caught:
        draw(demo_report(), tmp_path / "figure.png")
    assert caught.value.hint == "pip install 'qcli[plot]'"
