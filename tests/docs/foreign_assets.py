"""Whether pages of a built site load anything from another host: ``foreign_assets.py site``."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path

_LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
_NOT_LOADED = {"canonical", "prev", "next", "alternate"}


class _Assets(HTMLParser):
    """Collects what a browser fetches for a page by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in _LOADED and values.get("rel") not in _NOT_LOADED:
            self.urls.append(values.get(_LOADED[tag]) or "")


def foreign_assets(site: Path) -> list[str]:
    """``PAGE: URL`` of everything that is loaded from another host, styles' imports included."""
    found = []
    for page in sorted(site.rglob("*.html")):
        parser = _Assets()
        parser.feed(page.read_text(encoding="utf-8"))
        found += [f"{page}: {url}" for url in parser.urls if "//" in url]
    for style in sorted(site.rglob("*.css")):
        text = style.read_text(encoding="utf-8")
        found += [f"{style}: {word}" for word in ("url(http", "url(//", "@import") if word in text]
    return found


if __name__ == "__main__":
    assets = foreign_assets(Path(sys.argv[1]))
    if assets or not any(Path(sys.argv[1]).rglob("*.html")):
        sys.exit("\n".join(assets) or "there are no pages")
