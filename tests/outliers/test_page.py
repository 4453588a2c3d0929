"""The HTML report as text: whole, safe and small; tests/outliers/test_browser.py looks at it as a reader does."""

import json
import re
import sys

import pytest

from qcli.errors import QcliError
from qcli.outliers.page import page
from tests.outliers.reports import HOSTILE, demo_report

pytest.importorskip("plotly")


def embedded(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="report">(.*?)</script>', text, re.DOTALL)[1])


def test_the_page_holds_the_report_and_fetches_nothing():
    report = demo_report()
    text = page(report)
    assert embedded(text)["table4"] == report["table4"]
    assert len(text.encode()) < 6e6
    assert "{{" not in text.replace(report_script(text), "").split("<script>")[0]
    assert re.findall(r"<(?:link|img|iframe|object)\b|<script[^>]*\bsrc=", text.split("<script>")[0]) == []
    assert "default-src 'none'" in text


def report_script(text: str) -> str:
    return re.search(r'<script type="application/json".*?</script>', text, re.DOTALL)[0]


def test_a_deep_model_still_fits():
    assert len(page(demo_report(layers=300)).encode()) < 6e6


def test_hostile_text_stays_inside_the_data():
    plain, hostile = page(demo_report()), page(demo_report(name=HOSTILE[0], tokens=HOSTILE))
    assert embedded(hostile)["charts"]["surface"]["tokens"] == HOSTILE
    assert hostile.count("<script") == plain.count("<script")
    assert hostile.count("</script") == plain.count("</script")
    assert hostile.count("<!--") == plain.count("<!--")
    assert "&lt;/script&gt;" in re.search("<title>(.*?)</title>", hostile)[1]
    page(demo_report(name=HOSTILE[9], tokens=HOSTILE)).encode()  # a lone surrogate would not be writable


def test_not_a_number_is_refused():
    report = demo_report()
    report["layers"][0]["sites"][0]["kurtosis"] = float("nan")
    with pytest.raises(ValueError):
        page(report)


def test_without_plotly_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(QcliError) as caught:
        page(demo_report())
    assert caught.value.hint == "pip install 'qcli[plot]'"
