"""The pages: generated ones are fresh, all are in the navigation, links lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from blocks import PAGES, ROOT
from foreign_assets import foreign_assets
from write_pages import PAGES as WRITTEN

_LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)|!\[[^\]\n]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("name", WRITTEN)
def test_generated_pages_are_fresh(name: str) -> None:
    current = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert current == WRITTEN[name](), "run python tests/docs/write_pages.py"


def test_the_navigation_has_every_page_and_nothing_else() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = [page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")]
    assert sorted(_leaves(config["nav"])) == sorted(pages)
    assert config["theme"]["font"] is False


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_to_files(page: str) -> None:
    content = (ROOT / page).read_text(encoding="utf-8")
    for match in _LINK.finditer(re.sub(r"`[^`]*`", "", content)):
        target = (match[1] or match[2]).split("#")[0]
        if not target or re.match(r"[a-z]+:", target):
            continue
        file = (ROOT / page).parent / target
        assert file.exists(), f"{page} links to {target}"
        if page.startswith("docs/"):
            assert (ROOT / "docs") in file.resolve().parents, f"{target} is outside of the site"


def _leaves(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for value in nav.values():
            yield from _leaves(value)
    else:
        for value in nav:
            yield from _leaves(value)


def test_foreign_assets_are_seen(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<link rel="canonical" href="https://here/a.html"><a href="https://elsewhere/">x</a>'
        '<link rel="stylesheet" href="https://fonts/f.css"><script src="//cdn/x.js"></script>'
        '<img src="a.png">'
    )
    (tmp_path / "a.css").write_text("@import 'x.css'; b {background: url(data:image/png)}")
    found = [line.split(": ", 1)[1] for line in foreign_assets(tmp_path)]
    assert found == ["https://fonts/f.css", "//cdn/x.js", "@import"]
