"""Prose out of HTML and Markdown: code, tables, navigation and markup left behind."""

from __future__ import annotations

import re
from html.parser import HTMLParser

Sections = tuple[tuple[str, ...], ...]

_SKIPPED = frozenset(
    {"head", "script", "style", "pre", "table", "nav", "svg", "math", "figure", "button", "select"}
)
_HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
_SECTIONS = frozenset({"h1", "h2"})
"""Headings that end a section; smaller ones stand within its flow."""
_BLOCKS = frozenset(
    {"p", "li", "dd", "dt", "div", "section", "article", "header", "footer", "main"}
    | {"ul", "ol", "dl", "blockquote", "body", "br", "hr"}
)
_PLACE = frozenset({"path", "breadcrumb"})
"""Classes of the element that says where in a manual a page stands."""


class _Prose(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.sections: list[list[str]] = [[]]
        self.tags: list[str] = []
        self._text: list[str] = []
        self._place: list[str] | None = None
        self._place_tag = ""
        self._skip: list[str] = []
        self._heading = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = set((dict(attrs).get("class") or "").split())
        if self._skip or tag in _SKIPPED:
            if not self._skip or tag == self._skip[-1]:
                self._skip.append(tag)
            return
        if classes & _PLACE:
            self._place, self._place_tag = [], tag
        if tag in _HEADINGS:
            self._flush()
            self._heading = True
            if tag in _SECTIONS and self.sections[-1]:
                self.sections.append([])
        elif tag in _BLOCKS:
            self._flush()

    def handle_endtag(self, tag: str) -> None:
        if self._skip:
            if tag == self._skip[-1]:
                self._skip.pop()
            return
        if self._place is not None and tag == self._place_tag:
            self.tags.append(squeezed("".join(self._place)))
            self._place = None
        elif tag in _HEADINGS:
            self._heading = False
            self._text.clear()
        elif tag in _BLOCKS:
            self._flush()

    def handle_data(self, data: str) -> None:
        if self._skip or self._heading:
            return
        (self._text if self._place is None else self._place).append(data)

    def close(self) -> None:
        super().close()
        self._flush()

    def _flush(self) -> None:
        text = squeezed("".join(self._text))
        self._text.clear()
        if text:
            self.sections[-1].append(text)


def html_sections(text: str) -> tuple[tuple[str, ...], Sections]:
    """The page's places in its manual, and its paragraphs, section by section."""
    parser = _Prose()
    parser.feed(text)
    parser.close()
    return tuple(parser.tags), tuple(tuple(part) for part in parser.sections if part)


def markdown_sections(text: str) -> Sections:
    """Paragraphs of a Markdown file, section by section; ruby in the form ``{base|reading}``."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text.replace("\r\n", "\n"), flags=re.DOTALL)
    text = re.sub(r"^ *(```|~~~).*?^ *\1 *$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<(table|pre|script|style|ol|aside|h[1-6])\b.*?</\1>", "", text, flags=re.DOTALL)
    sections: list[list[str]] = [[]]
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.strip().splitlines()]
        if lines and re.match(r"#{1,6} ", lines[0]):
            sections.append([])
            lines = lines[1:]
        kept = [
            re.sub(r"^([-*+]|\d+[.)]|>) +", "", line)
            for line in lines
            if not re.match(r"(\||\[＊|\[[^\]]+\]:|!\[|https?:|\${2})", line)
        ]
        paragraph = plain(_inline(" ".join(kept)))
        if paragraph:
            sections[-1].append(paragraph)
    return tuple(tuple(part) for part in sections if part)


def _inline(text: str) -> str:
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    # a link's text stays, but not a note's mark
    text = re.sub(r"\[(?:<[^>]*>)*＊註.*?\]\([^)]*\)(\{[^}]*\})?", "", text)
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"\{([^{}|]+)\|[^{}|]+\}", r"\1", text)
    return re.sub(r"(\*\*|__|`)", "", text)


def plain(text: str) -> str:
    """Text without tags and without runs of white space; empty lines stay."""
    text = re.sub(r"</?[A-Za-z][^<>]*>", "", text)
    return "\n\n".join(squeezed(part) for part in re.split(r"\n\s*\n", text)).strip()


def squeezed(text: str) -> str:
    """Runs of white space as one space, and none between two Japanese characters."""
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"(?<=[^\x00-\xff]) (?=[^\x00-\xff])", "", text)
