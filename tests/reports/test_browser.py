"""The page of a real run in a real browser: drawn, quiet, complete, legible, as wide as a phone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import browser as driver
import pytest
from browser import Browser

from so8tqc.languages import Language
from so8tqc.services.report import report

pytestmark = [
    pytest.mark.llama,
    pytest.mark.png,
    pytest.mark.skipif(not driver.installed(), reason="no Chrome"),
]

PHONE = 390
"""CSS pixels; the width of a common phone."""

SMALLEST_CONTRAST = 4.5
"""WCAG 2.1 level AA for text of normal size."""

PLOTS = """[...document.querySelectorAll(".plotly-graph-div")].map(plot => ({
  traces: plot.data.length,
  drawn: plot.querySelectorAll(".main-svg .trace, .main-svg .hm image, .gl-canvas").length,
  width: plot.getBoundingClientRect().width,
  axes: plot.querySelectorAll("[class^=x][class$=tick] text").length,
}))"""

TEXTS = """(() => {
  const number = colour => colour.match(/[\\d.]+/g).map(Number);
  const ground = node => {
    for (; node; node = node.parentElement) {
      const [r, g, b, alpha] = number(getComputedStyle(node).backgroundColor);
      if (alpha === undefined || alpha === 1) return [r, g, b];
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll("body *")]
    .filter(node => node.checkVisibility() && !node.closest(".js-plotly-plot, script, style"))
    .filter(node => [...node.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
    .map(node => [
      `${node.tagName}.${node.className}`,
      number(getComputedStyle(node).color).slice(0, 3),
      ground(node),
    ]);
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with driver.open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(real_run: Path) -> Path:
    return real_run / "report" / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, PHONE])
def test_the_page_is_quiet_asks_for_nothing_and_fits(
    browser: Browser, page: Path, scheme: str, width: int
) -> None:
    browser.show(page, scheme=scheme, width=width)
    assert browser.complaints == []
    asked = [address for address in browser.requests if urlsplit(address).scheme != "data"]
    assert asked == [page.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [1280, PHONE])
def test_a_japanese_page_is_as_good(
    browser: Browser, real_run: Path, tmp_path: Path, width: int
) -> None:
    copied = tmp_path / "run"
    shutil.copytree(real_run, copied, ignore=shutil.ignore_patterns("*.gguf", "baked_model"))
    report(copied, language=Language.JAPANESE)
    browser.show(copied / "report" / "report.html", width=width)
    assert browser.complaints == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert "品質検査" in browser.evaluate("document.querySelector('#qc h2').innerText")
    lines = "[...document.querySelectorAll('#qc .verdict')].map(v => v.getClientRects().length)"
    assert set(browser.evaluate(lines)) == {1}  # no verdict is broken into single letters


@pytest.mark.parametrize("width", [1280, PHONE])
def test_every_plot_is_drawn(browser: Browser, page: Path, width: int) -> None:
    browser.show(page, width=width)
    plots = browser.evaluate(PLOTS)
    assert len(plots) == page.read_text(encoding="utf-8").count("Plotly.newPlot(") >= 7
    for plot in plots:
        assert 0 < plot["traces"] <= plot["drawn"]
        assert plot["axes"] >= 2
        assert 250 < plot["width"] <= width


def test_every_page_of_the_run_is_quiet_and_drawn(browser: Browser, real_run: Path) -> None:
    pages = sorted(real_run.glob("*/*.html"))
    assert {p.parent.name for p in pages} == {
        "bake",
        "qc",
        "choose",
        "calibrate",
        "longtext",
        "report",
    }
    for each in pages:
        browser.show(each, width=PHONE)
        assert browser.complaints == [], each
        assert all(plot["drawn"] for plot in browser.evaluate(PLOTS)), each


def test_anchors_and_links_lead_somewhere(browser: Browser, page: Path) -> None:
    browser.show(page)
    targets = browser.evaluate("[...document.querySelectorAll('a')].map(a => a.href)")
    ids = set(browser.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)"))
    assert len(targets) > 10
    for target in targets:
        parts = urlsplit(target)
        assert parts.scheme == "file"
        assert Path(unquote(parts.path)).is_file(), target
        assert not parts.fragment or parts.fragment in ids, target
    assert any(urlsplit(target).fragment for target in targets)
    assert any(not urlsplit(target).fragment for target in targets)


def luminance(colour: list[float]) -> float:
    """Relative luminance of an sRGB colour, as WCAG 2.1 defines it."""
    parts = [c / 255 for c in colour]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: list[float], other: list[float]) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_light_and_dark_differ_and_all_text_is_legible(browser: Browser, page: Path) -> None:
    assert contrast([0, 0, 0], [255, 255, 255]) == pytest.approx(21.0)
    assert contrast([119, 119, 119], [255, 255, 255]) == pytest.approx(4.48, abs=0.005)
    grounds = {}
    for scheme in ("light", "dark"):
        browser.show(page, scheme=scheme)
        browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        texts = browser.evaluate(TEXTS)
        assert len(texts) > 500
        faint = {
            name: (ink, ground)
            for name, ink, ground in texts
            if contrast(ink, ground) < SMALLEST_CONTRAST
        }
        assert faint == {}, scheme
        grounds[scheme] = rgb(browser, "document.body", "backgroundColor")
        ticks = rgb(browser, "document.querySelector('.main-svg .xtick text')", "fill")
        assert contrast(ticks, grounds[scheme]) >= SMALLEST_CONTRAST
    assert luminance(grounds["dark"]) < 0.1 < 0.9 < luminance(grounds["light"])


def rgb(browser: Browser, node: str, style: str) -> list[float]:
    value = browser.evaluate(f"getComputedStyle({node}).{style}")
    return [float(part) for part in re.findall(r"[\d.]+", value)[:3]]


def test_the_first_screen_answers_before_anything_is_scrolled(browser: Browser, page: Path) -> None:
    browser.show(page)
    for part in ("h1 .pill", ".tested", ".cards", ".finding li"):
        bottom = f"document.querySelector('{part}').getBoundingClientRect().bottom"
        assert 0 < browser.evaluate(bottom) <= driver.HEIGHT, part
    assert browser.evaluate("document.querySelectorAll('.card').length") == 3


def test_paper_shows_everything(browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.show(page)
    printed = tmp_path / "page.pdf"
    browser.pdf(printed)
    assert printed.read_bytes().startswith(b"%PDF")
    # Chromium has fired beforeprint for the PDF: nothing stayed folded
    assert browser.evaluate("document.querySelectorAll('details:not([open])').length") == 0
    assert browser.evaluate("document.querySelectorAll('details').length") > 10


def test_a_failed_file_is_named_first_with_the_command_that_helps(
    browser: Browser, real_run: Path, tmp_path: Path
) -> None:
    """The Q4_K_M file keeps too few top tokens; its KL alone would pass."""
    record = json.loads((real_run / "qc" / "record.json").read_text(encoding="utf-8"))
    failed = {check["id"] for check in record["checks"] if check["verdict"] == "fail"}
    assert failed == {"kl.top1"}
    copied = tmp_path / "run"
    shutil.copytree(real_run, copied, ignore=shutil.ignore_patterns("*.gguf", "baked_model"))
    report(copied)
    browser.show(copied / "report" / "report.html")
    cards = browser.evaluate("[...document.querySelectorAll('.card.fail')].map(c => c.innerText)")
    assert len(cards) == 1
    assert "tiny-Q4_K_M.gguf" in cards[0]
    assert "failed: kl.top1" in cards[0]
    command = browser.evaluate("document.querySelector('.finding .command').innerText")
    assert re.fullmatch(
        r"so8tqc quantize \S+/tiny-F16.gguf --type Q5_K_M --out \S+/quantize", command
    )
    words = browser.evaluate("document.querySelectorAll('#qc td.words mark').length")
    assert words == 8 * 4
