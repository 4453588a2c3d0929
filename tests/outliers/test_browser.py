"""The HTML report in headless Chromium: every chart drawn, nothing fetched, and what its switches and sliders do."""

import contextlib
import itertools
import re
import shutil

import numpy as np
import pytest

from qcli.outliers.page import page
from tests.outliers.reports import HOSTILE, demo_report

pytest.importorskip("plotly")
WHOLE = demo_report(tokens=HOSTILE, name=HOSTILE[1])
BARE = demo_report(optional=False, layers=1, kinds=("ffn input",))
DEEP = demo_report(outliers=False, layers=300)

# Charts by name: of every report, of outlier features, of what may be left out.
ALWAYS = {"emergence", "kurtosis", "crest", "residual", "surface", "simulation-sqnr", "simulation-codes"}
OUTLIERS = {"heatmap", "features", "histogram-0", "histogram-1", "histogram-2"}
MEASURED = {"sqnr", "attention"}
ABLATED = {"ablation-top1", "ablation-perplexity"}


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on PATH")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def show(browser, tmp_path_factory):
    """Opens the page of a report and waits until it stands; at its end nothing may have gone wrong in it."""
    numbers = itertools.count()

    @contextlib.contextmanager
    def show(report, **options):
        file = tmp_path_factory.mktemp("page") / f"{next(numbers)}.html"
        file.write_text(page(report), encoding="utf-8")
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
        shown, troubles = context.new_page(), []
        shown.on("console", lambda message: message.type == "error" and troubles.append(message.text))
        shown.on("pageerror", lambda error: troubles.append(str(error)))
        shown.on("request", lambda request: request.url != file.as_uri() and troubles.append(request.url))
        shown.goto(file.as_uri())
        settled(shown, lambda: not missing(shown))
        yield shown
        assert troubles == []
        context.close()

    return show


def settled(shown, reached) -> None:
    for _ in range(400):
        if reached():
            return
        shown.wait_for_timeout(25)
    pytest.fail("the page did not settle")


VISIBLE = "[...document.querySelectorAll('.chart')].filter((chart) => chart.offsetParent)"


def missing(shown) -> list[str]:
    """Charts in view that are not drawn: no traces, no picture, or one without area."""
    return shown.evaluate(
        VISIBLE
        + """.filter((chart) => {
            const picture = chart.querySelector('svg.main-svg, canvas');
            return !chart.data?.length || !picture || !(picture.getBoundingClientRect().height > 100);
        }).map((chart) => chart.id)"""
    )


def charts(shown) -> set[str]:
    return {name.removesuffix("-chart") for name in shown.evaluate(VISIBLE + ".map((chart) => chart.id)")}


def traces(shown, name: str) -> list[dict]:
    """Type, name and numbers of a chart's traces, as plotly holds them."""
    return shown.evaluate(
        """(id) => document.getElementById(id).data.map(
            ({ type, name, x, y, z }) => ({ type, name, x, y, z: z?.map((row) => [...row]) }))""",
        name,
    )


@pytest.fixture(scope="module")
def full(show):
    """The page of `WHOLE`, shared by tests that each set what they look at."""
    with show(WHOLE, permissions=["clipboard-read", "clipboard-write"]) as shown:
        yield shown


def test_every_chart_of_a_whole_report_is_drawn(full):
    assert charts(full) == ALWAYS | OUTLIERS | MEASURED | ABLATED
    titled = "({ layout }) => [layout.xaxis?.title?.text, layout.yaxis?.title?.text]"
    for chart in full.evaluate(f"{VISIBLE}.map({titled})"):
        assert chart[1] and chart[0] is not None  # bars of a few names need no title below them


def test_text_of_the_report_is_never_markup(full):
    assert full.evaluate("window.entered") is None
    assert full.evaluate("document.querySelectorAll('img, main b').length") == 0
    assert full.locator("h1").text_content() == f"Outlier features of {HOSTILE[1]}"
    labels = full.locator("#surface-chart .ytick text").all_text_contents()
    assert "<b>bold</b>" in labels and "&amp;" in labels and "\\n" in labels and "$x^2$" in labels


def test_the_papers_table_has_this_model_in_its_place(full):
    rows = full.locator("#paper-table tbody tr").all_text_contents()
    assert len(rows) == 11
    assert "33.5" in rows[0] and "12.5" in rows[10]
    marked = full.locator("#paper-table tr.mark td").all_text_contents()
    assert rows.index("".join(marked)) == 3  # 25.1 is between FSEQ 125M, 25.7, and GPT2 762M, 22.6
    assert marked[1:] == ["1.37M", "25.1", "3", "2", "100%", "95%", "99%", "\u221255, \u221250, \u221245", "41%", "20%"]


def test_the_command_can_be_copied(full):
    full.locator("#recommendation button").click()
    settled(full, lambda: full.locator("#recommendation button").text_content() == "Copied")
    assert full.evaluate("navigator.clipboard.readText()") == WHOLE["recommendation"]["command"]


def test_the_heatmap_switches_from_absmax_to_share(full):
    chart = WHOLE["charts"]["heatmap"]
    (before,) = traces(full, "heatmap-chart")
    assert before["y"] == [str(dim) for dim in chart["dims"]] and before["x"] == chart["layers"]
    np.testing.assert_allclose(10 ** np.array(before["z"]), np.array(chart["absmax"]).T, rtol=1e-5)
    full.get_by_text("share of positions").click()
    np.testing.assert_allclose(traces(full, "heatmap-chart")[0]["z"], 100 * np.array(chart["share"]).T, rtol=1e-5)


def test_histograms_show_each_value_once(full):
    for i, histogram in enumerate(WHOLE["charts"]["histograms"]):
        shown = full.evaluate(f"document.getElementById('histogram-{i}').data[0]")
        assert np.dot(shown["y"], shown["width"]) == pytest.approx(sum(histogram["counts"]))
        top = np.argmax(shown["y"])  # holds the median, as these values are Gaussian
        assert abs(shown["x"][top] - histogram["quartiles"][1]) <= shown["width"][top] / 2


def test_sqnr_switches_between_the_whole_and_ordinary_channels_and_between_sites(full):
    def expected(site, part):
        measured = [layer["sites"][site]["sqnr"] for layer in WHOLE["layers"]]
        return {method: [sqnr[method][part] for sqnr in measured] for method in measured[0]}

    def shown():
        return {trace["name"]: pytest.approx(trace["y"], rel=1e-5) for trace in traces(full, "sqnr-chart")}

    assert expected(0, "ordinary") == shown()
    full.get_by_text("the whole output", exact=True).click()
    assert expected(0, "output") == shown()
    full.locator("#sqnr-choices").get_by_text("ffn output").click()
    assert expected(3, "output") == shown()
    full.get_by_text("ordinary channels", exact=True).first.click()
    assert expected(3, "ordinary") == shown()


def test_the_emergence_curve_runs_along_perplexity_or_size(full):
    by_perplexity = traces(full, "emergence-chart")
    assert by_perplexity[0]["x"][0] == 12.5 and by_perplexity[0]["y"][0] == 100
    assert [trace["x"] for trace in by_perplexity[2:]] == [[25.1], [25.1]]
    full.locator("#emergence-choices").get_by_text("size").click()
    by_size = traces(full, "emergence-chart")
    assert by_size[0]["x"] == [117e6, 125e6, 345e6, 762e6, 1.3e9, 1.5e9, 2.7e9, 6e9, 6.7e9, 13e9]
    assert by_size[1]["y"] == pytest.approx([6, 22, 18, 16, 47, 35, 18, 28, 75, 73])
    assert [trace["x"] for trace in by_size[2:]] == [[1369728], [1369728]]


def test_tokens_and_channels_also_stand_as_a_surface(full):
    values = np.array(WHOLE["charts"]["surface"]["values"])
    np.testing.assert_allclose(traces(full, "surface-chart")[0]["z"], values, atol=1e-5)
    full.get_by_text("surface", exact=True).click()
    (trace,) = traces(full, "surface-chart")
    assert trace["type"] == "surface"
    np.testing.assert_allclose(trace["z"], np.abs(values), atol=1e-5)
    settled(full, lambda: full.locator("#surface-chart canvas").count() > 0)
    full.get_by_text("heatmap", exact=True).click()


def test_the_table_of_sites_sorts(full):
    full.locator("#sites-table th", has_text="kurtosis").get_by_role("button").click()
    cells = [float(text) for text in full.locator("#sites-table td:nth-child(8)").all_text_contents()]
    assert len(cells) == 24 and cells == sorted(cells, reverse=True)


def test_light_and_dark_change_the_charts_too(full):
    def colours():
        return full.evaluate("[getComputedStyle(document.body).color, document.getElementById('sqnr-chart').layout.font.color]")

    light = colours()
    full.emulate_media(color_scheme="dark")
    settled(full, lambda: colours()[1] != light[1])
    assert colours()[0] != light[0]
    full.emulate_media(color_scheme="light")
    settled(full, lambda: colours() == light)


def simulated(shown, **sliders) -> dict[str, list[float]]:
    """The simulation's table after a move of its sliders: vector-wise, LLM.int8()."""
    for name, value in sliders.items():
        shown.locator(f"#{name}").fill(str(value))
    # An input is answered in the next frame; this one is asked for later.
    shown.evaluate("new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)))")
    for name, value in sliders.items():
        assert shown.locator(f"#{name}-value").text_content().removesuffix("%") == str(value)
    rows = shown.evaluate(
        "[...document.querySelectorAll('#simulation-table tbody tr')].map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    return {name: [float(value.removesuffix("%")) for value in values] for name, *values in rows}


# Output SQNR in dB of vector-wise int8 and LLM.int8(), and the share of ordinary values that vector-wise int8 rounds to zero,
# by numpy in float64 on 4096 x 4096 Gaussian weights; 6 dims of 4096 at this magnitude in 75% of the tokens.
@pytest.mark.parametrize(
    ("magnitude", "columns", "vectorwise", "decomposed", "zeros"),
    [(1, 0, 38.2, 38.2, 1), (8, 6, 33.4, 38.4, 3), (20, 6, 27.4, 39.0, 7), (40, 6, 24.2, 39.9, 14), (60, 6, 23.4, 40.6, 21)],
)
def test_the_simulation_agrees_with_a_large_matrix(full, magnitude, columns, vectorwise, decomposed, zeros):
    found = simulated(full, magnitude=magnitude, columns=columns, share=75)
    assert found["SQNR of the whole output (dB)"] == pytest.approx([vectorwise, decomposed], abs=1)
    assert found["ordinary values that become zero"] == pytest.approx([zeros, 1], abs=1)
    drawn = traces(full, "simulation-sqnr")
    assert [round(trace["y"][0], 1) for trace in drawn] == found["SQNR of the whole output (dB)"]
    assert sum(traces(full, "simulation-codes")[0]["y"]) == pytest.approx(100)


def by_numpy(magnitude, columns, share):
    """The same experiment with other dice and eight times the outputs, in float64."""
    dice = np.random.default_rng(0)
    x, w = dice.standard_normal((64, 4096)), dice.standard_normal((4096, 512))
    chosen = np.arange(columns) * 300
    outliers = magnitude * (1 + 0.1 * dice.standard_normal((64, columns)))
    x[:, chosen] = np.where(dice.random((64, columns)) < share, outliers, x[:, chosen])
    apart = (np.abs(x) >= 6).any(0)
    w8 = np.round(w / (scale := np.abs(w).max(0) / 127)) * scale

    def int8(rows):
        steps = np.abs(rows).max(1, keepdims=True) / 127
        return np.round(rows / steps) * steps

    def sqnr(signal, other):
        return 10 * np.log10((signal**2).sum() / ((signal - other) ** 2).sum())

    ordinary = np.where(apart, 0, x)
    exact = ordinary @ w
    plain, decomposed = int8(x), int8(ordinary)
    return {
        "SQNR of the whole output (dB)": [sqnr(x @ w, plain @ w8), sqnr(x @ w, decomposed @ w8 + (x - ordinary) @ w8)],
        "SQNR through ordinary channels (dB)": [sqnr(exact, np.where(apart, 0, plain) @ w8), sqnr(exact, decomposed @ w8)],
    }


@pytest.mark.parametrize(("magnitude", "columns", "share"), [(30, 12, 50), (50, 3, 25)])
def test_the_sliders_mean_what_they_say(full, magnitude, columns, share):
    found = simulated(full, magnitude=magnitude, columns=columns, share=share)
    for name, expected in by_numpy(magnitude, columns, share / 100).items():
        assert found[name] == pytest.approx(expected, abs=1), name


def test_below_the_threshold_nothing_is_taken_apart(full):
    found = simulated(full, magnitude=3, columns=12, share=100)
    assert all(plain == apart for plain, apart in found.values())
    assert "nothing is taken apart" in full.locator("#simulation-text").text_content()


@pytest.mark.parametrize(
    ("report", "drawn", "sentence"),
    [
        (BARE, ALWAYS | OUTLIERS, "Not measured in this run"),
        (DEEP, ALWAYS | MEASURED, "No dimension of the hidden states reaches 6"),
    ],
    ids=["nothing optional, one layer, one kind of site", "no outliers, 300 layers"],
)
def test_what_was_not_measured_is_left_out_or_said(show, report, drawn, sentence):
    with show(report, viewport={"width": 390, "height": 800}, color_scheme="dark") as shown:
        assert charts(shown) == drawn
        assert sentence in shown.locator("main").inner_text()
        assert not re.search(r"\b(?:null|undefined|NaN|\[object)\b", shown.locator("body").inner_text())
        assert shown.evaluate("document.documentElement.scrollWidth") <= 390  # only tables scroll sideways
