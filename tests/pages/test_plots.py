"""Drawings: axes, what lies where, and Markdown and HTML that show a text as it is."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from gptjax.pages.blocks import Cell, Page, Quote, Section, Table, Text
from gptjax.pages.html import html, inline
from gptjax.pages.markdown import markdown, plain
from gptjax.pages.plots import DARK, LIGHT, LinePlot, Row, RowPlot, Series, colour_class, count_texts, tick_texts, ticks
from gptjax.pages.png import png
from gptjax.pages.svg import NARROW, WIDE, svg
from tests.analysis.test_page import read

LINES = LinePlot(
    "alt & <more>",
    "tokens",
    "loss",
    (
        Series(1, "a<b", np.array([0.0, 1e6]), np.array([3.0, 2.0]), np.array([2.9, 1.9]), np.array([3.1, 2.1])),
        Series(2, "$c_d$", np.array([0.0, 1e6]), np.array([3.0, 2.01]), faint=((np.array([0.0, 1e6]), np.array([3.0, 2.2])),)),
        Series(9, "far", np.array([0.0, 1e6]), np.array([9.0, 8.0])),
        Series(0, "", np.array([0.0, 1e6]), np.array([2.5, 2.5])),
    ),
    (0.0, 1e6),
    (1.5, 3.5),
    line=2.25,
)
ROWS = RowPlot(
    "rows",
    "difference",
    (Row("a" * 200, 0.5, 0.25, 0.75, (0.4, 0.6), 1, "yes"), Row("b", -0.5, None, None, (), 2, strong=False), Row("c", None)),
    zero=0.0,
)


@pytest.mark.parametrize(
    "low, high", [(0, 1), (1.7528, 2.3142), (-0.61, 0.52), (0, 1.536e6), (3e-5, 4e-5), (-2e-3, 5e9), (99.1, 99.2)]
)
@pytest.mark.parametrize("most", [4, 6, 7])
def test_ticks_are_round_few_and_inside(low, high, most):
    found = ticks(low, high, most)
    assert 2 <= len(found) <= most
    assert all(low - 1e-9 * abs(low) <= value <= high * (1 + 1e-9) for value in found)
    step = found[1] - found[0]
    assert re.fullmatch(r"[125]\.?0*e.*", f"{step:.6e}") and np.allclose(np.diff(found), step)
    assert len(set(tick_texts(found))) == len(found)


def test_the_texts_of_ticks():
    assert tick_texts([1.7, 1.75, 1.8]) == ["1.70", "1.75", "1.80"] and tick_texts([-1, 0, 1]) == ["−1", "0", "1"]
    assert count_texts([0, 5e5, 1e6, 1.5e6]) == ["0", "0.5M", "1M", "1.5M"] and tick_texts([0, 2e5]) == ["0", "200k"]
    assert ticks(2.0, 2.0) == [2.0] and tick_texts([2.0]) == ["2"]


def test_curves_lie_where_their_numbers_say():
    root = ElementTree.fromstring(svg(LINES))
    assert root.get("aria-label") == "alt & <more>" and float(root.get("width")) == WIDE
    labels = {
        node.text: (float(node.get("x")), float(node.get("y")) - 4)
        for node in root.iter("text")
        if node.get("text-anchor") == "end"
    }
    per_unit = (labels["2.0"][1] - labels["3.0"][1]) / 1.0
    path = next(node for node in root.iter("path") if node.get("class") == "s1 line")
    points = [tuple(map(float, pair.split())) for pair in path.get("d")[1:].split("L")]
    assert points[0][1] == pytest.approx(labels["3.0"][1], abs=0.06) and points[1][1] == pytest.approx(labels["2.0"][1], abs=0.06)
    band = next(node for node in root.iter("path") if node.get("class") == "s1 band").get("d")
    ys = [float(pair.split()[1]) for pair in band[1:-1].split("L")]
    assert ys == pytest.approx([labels["3.0"][1] - per_unit * (value - 3) for value in (2.9, 1.9, 2.1, 3.1)], abs=0.06)
    names = [(node.text, float(node.get("y"))) for node in root.iter("text") if "name" in node.get("class", "").split()]
    assert sorted(text for text, _ in names) == ["1", "2", "9↑"]  # grey has none; what is off the drawing has an arrow
    heights = sorted(y for _, y in names)
    assert min(np.diff(heights)) >= 12.9  # 2.00 and 2.01 would lie on one another
    assert {node.get("class") for node in root.iter("path")} >= {"s1 line", "s2 faint", "s2 line", "s2 d1 line", "s0 line"}


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_rows_lie_on_their_axis_and_names_are_cut(width):
    root = ElementTree.fromstring(svg(ROWS, width))
    axis = {
        float(n.text.replace("−", "-")): float(n.get("x")) for n in root.iter("text") if re.fullmatch(r"−?\d\.\d", n.text or "")
    }
    slope, origin = np.polyfit(list(axis), list(axis.values()), 1)
    points = [n for n in root.iter("circle") if "point" in n.get("class").split()]
    assert [float(n.get("cx")) for n in points] == pytest.approx([origin + slope * 0.5, origin - slope * 0.5], abs=0.2)
    assert [("hollow" in n.get("class")) for n in points] == [False, True]
    spans = [n for n in root.iter("line") if "span" in n.get("class")]
    assert (
        float(spans[0].get("x1")) == pytest.approx(origin + slope * 0.25, abs=0.2) and len(spans) == 3
    )  # the bar and its two ends
    texts = ["".join(n.itertext()) for n in root.iter("text") if n.get("class") == "rowname"]
    assert texts[0].endswith("…") and "a" * 200 in texts[0] and texts[1:] == ["2 b", "c"]
    assert all(0 <= float(n.get(key)) <= width for n in root.iter("text") for key in ("x",) if n.get(key))


def test_pngs_are_drawn_of_both_whatever_their_texts():
    for plot in (LINES, ROWS, RowPlot("bars", "share", (Row("a_$b", 0.5, note="50 %"), Row("c", None, note="?")), bars=True)):
        assert png(plot).startswith(b"\x89PNG")


def test_bars_begin_at_zero_and_equal_values_have_an_axis():
    assert RowPlot("", "", (Row("a", 0.5),), bars=True).x_range()[0] == 0.0
    low, high = RowPlot("", "", (Row("a", 2.0), Row("b", 2.0))).x_range()
    assert low < 2.0 < high and all(map(math.isfinite, RowPlot("", "", (Row("a", None),)).x_range()))
    assert "<svg" in svg(RowPlot("", "x", (Row("a", None),)))


def luminance(colour: str) -> float:
    """WCAG 2.1's relative luminance."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colours_stand_out_from_their_paper():
    for colours, paper in ((LIGHT, "#ffffff"), (DARK, "#14171e")):
        for colour in colours:
            lighter, darker = sorted((luminance(colour), luminance(paper)), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) >= 3.5
    assert [colour_class(number) for number in (0, 1, 7, 8, 15)] == ["s0", "s1", "s7", "s1 d1", "s1 d2"]


def test_a_text_is_shown_as_it_is():
    evil = "<img src=x onerror=y> **b** `c` [d](http://e) a_b_c | $x$ #1"
    table = Table("cap <i>", ("a|b", ""), ((Cell(evil, 2), evil),), frozenset({1}))
    page = Page(
        evil,
        evil,
        (
            Section(
                "s",
                "S",
                (Text(evil), Text("**so** *it* `is <x>` [there](https://e.org)", markdown=True), table, Quote("q", evil)),
            ),
        ),
    )
    found = read(html(page))
    assert found.text.count(evil) == 7 and "img" not in found.tags and "so it is <x> there" in found.text
    shown = markdown(page, "figures")
    assert shown.count("\n|") == 3 and "\\*\\*b\\*\\* \\`c\\` \\[d\\](http://e)" in shown and "```text\n" + evil in shown
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in shown.splitlines() if line.startswith("|"))
    assert plain("# a\n1. b") == "\\# a 1. b" and plain("1. b") == "1\\. b"
    assert inline("2 * 3 * 4 and snake_case_name") == "2 * 3 * 4 and snake_case_name"
