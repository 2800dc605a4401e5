"""Paragraphs of a LyX document: the plain ones, without formulas, code and references."""

from __future__ import annotations

import re

_KEPT = frozenset({"Standard", "Itemize", "Enumerate", "Quotation", "Quote"})
_HEADINGS = frozenset({"Part", "Chapter", "Section", "Subsection", "Subsubsection"})


def read_lyx(text: str) -> tuple[tuple[str, ...], ...]:
    """The paragraphs of a LyX document, section by section.

    A paragraph with an inset (formula, cross reference, code) would read with a hole, so it is
    left out whole; one whose only insets are index entries stays.
    """
    sections: list[list[str]] = [[]]
    words: list[str] = []
    layout, depth, whole = "", 0, True
    for raw in text.splitlines():
        line = re.sub(r"\\SpecialChar (LyX|LaTeX2e|LaTeX|TeX)", r"\1", raw)
        if line.startswith("\\begin_inset"):
            depth += 1
            whole = whole and (depth > 1 or line.startswith("\\begin_inset Index"))
        elif line.startswith("\\end_inset"):
            depth -= 1
        elif depth:
            continue
        elif line.startswith("\\begin_layout"):
            layout, words, whole = line.partition(" ")[2].strip(), [], True
            if layout.rstrip("*") in _HEADINGS:
                sections.append([])
        elif line.startswith("\\end_layout"):
            if layout in _KEPT and whole and words:
                sections[-1].append("".join(words).strip())
        elif "\\SpecialChar" in line:
            whole = False
        elif not line.startswith(("\\", "#", "<")):
            words.append(line)
    return tuple(tuple(part) for part in sections if part)
