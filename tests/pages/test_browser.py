"""Pages as a browser shows them: nothing on its console, nothing asked of a network, and all of it legible.

Skipped where no Chromium is installed (Debian: apt-get install chromium).
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from gptjax import cli
from gptjax.analysis.predictions import write_predictions
from tests.analysis.test_findings import make
from tests.pages.browser import Browser, find_chromium
from tests.sweeps.test_compare import make_groups

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed, in which pages would be looked at")

# Texts on the page whose contrast with what lies behind them is below WCAG AA's 4.5, or whose letters are below LEAST pixels.
ILLEGIBLE = """(() => {
  const channels = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => { const f = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    return .2126 * f(r) + .7152 * f(g) + .0722 * f(b); };
  const over = (top, below) => { const a = top.length > 3 ? top[3] : 1; return below.map((v, i) => a * top[i] + (1 - a) * v); };
  const behind = node => { const layers = [];
    for (let at = node; at; at = at.parentElement) { const c = channels(getComputedStyle(at).backgroundColor);
      if (c.length === 3 || c[3] > 0) layers.push(c); }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]); };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const box = node.getBoundingClientRect(), style = getComputedStyle(node);
    const own = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
    if (!own || !box.width || !box.height || node.closest("style, title, .skip")) continue;
    const svg = node.closest("svg"), scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    const ink = over(channels(svg ? style.fill : style.color), behind(node)), paper = behind(node);
    const [a, b] = [light(ink), light(paper)].sort((x, y) => y - x), contrast = (a + .05) / (b + .05);
    const limit = node.classList.contains("name") ? 3.5 : 4.5;
    if (contrast < limit || parseFloat(style.fontSize) * scale < LEAST)
      found.push(`${node.tagName} ${node.className.baseVal ?? node.className}: "${node.textContent.slice(0, 30)}" ${contrast}`);
  }
  return found; })()"""

# Texts of drawings that leave them, or lie on one another.
MISPLACED = """(() => { const found = [];
  for (const svg of document.querySelectorAll("svg.plot, svg.chart")) {
    const edge = svg.getBoundingClientRect(); if (!edge.width) continue;
    const boxes = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
    boxes.forEach(([text, box], i) => {
      if (box.left < edge.left - 1 || box.right > edge.right + 1 || box.top < edge.top - 1 || box.bottom > edge.bottom + 1)
        found.push(`"${text}" leaves its drawing`);
      for (const [other, its] of boxes.slice(i + 1))
        if (Math.min(box.right, its.right) - Math.max(box.left, its.left) > 1
            && Math.min(box.bottom, its.bottom) - Math.max(box.top, its.top) > 4) found.push(`"${text}" lies on "${other}"`);
    }); }
  return found; })()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium") / "profile") as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    folder = tmp_path_factory.mktemp("pages")
    make_groups(folder / "runs", {1e-3: 1.90, 2e-3: 1.80, 3e-3: 1.8001, 4e-3: 1.801}, seeds=4)
    (folder / "runs" / "0.001-0" / "samples").mkdir()
    (folder / "runs" / "0.001-0" / "samples" / "00000040.txt").write_text("To be <b>or</b> not " + "w" * 300)
    assert cli.main(["report", str(folder / "runs"), "--target=2", "--formats=html"]) == 0
    write_predictions(folder / "p.jsonl", make())
    assert cli.main(["analyze", str(folder / "p.jsonl"), "--resamples=20"]) == 0
    return {"report": folder / "runs" / "report" / "report.html", "analysis": folder / "p.html"}


@pytest.mark.parametrize("name", ["report", "analysis"])
@pytest.mark.parametrize("width, dark, media", [(1200, False, ""), (1200, True, ""), (390, True, ""), (720, True, "print")])
def test_a_page_is_quiet_self_contained_and_legible(browser, pages, name, width, dark, media):
    browser.open(pages[name], width=width, dark=dark, media=media)
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [pages[name].resolve().as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    least = "9" if media else "10"  # of paper, 6.75 points
    assert browser.evaluate(ILLEGIBLE.replace("LEAST", least)) == [] and browser.evaluate(MISPLACED) == []
    shown = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert shown == ("rgb(20, 23, 30)" if dark and not media else "rgb(255, 255, 255)")
    assert browser.evaluate("document.querySelectorAll('svg.plot, svg.chart, svg.bar').length") > 0


def test_the_checks_see_what_is_wrong(browser, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text(
        '<!DOCTYPE html><html lang="en"><body style="background:#fff"><p style="color:#bbb">pale</p>'
        '<p style="width:3000px">wide</p>'
        '<img src="http://127.0.0.1:9/x.png" alt=""><script>console.error("no")</script>'
        '<svg class="plot" width="90" height="20" viewBox="0 0 90 20"><text x="60" y="12">far too long</text></svg></body></html>'
    )
    browser.open(path)
    assert any("no" in one for one in browser.complaints()) and "http://127.0.0.1:9/x.png" in browser.requests()
    assert not browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert "pale" in str(browser.evaluate(ILLEGIBLE.replace("LEAST", "10"))) and browser.evaluate(MISPLACED) == [
        '"far too long" leaves its drawing'
    ]
