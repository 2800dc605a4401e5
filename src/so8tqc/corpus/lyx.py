"""Paragraphs of a LyX document: the plain ones, without formulas, code and references."""

from __future__ import annotations

_KEPT = frozenset({"Standard", "Itemize", "Enumerate", "Quotation", "Quote"})
_HEADINGS = frozenset({"Part", "Chapter", "Section", "Subsection", "Subsubsection"})


def read_lyx(text: str) -> tuple[tuple[str, ...], ...]:
    """Sections of paragraphs.

    A paragraph with an inset (formula, cross reference, code) would read with a hole, so it is
    left out whole; one whose only insets are index entries or quotation marks stays.
    """
    sections: list[list[str]] = [[]]
    words: list[str] = []
    layout, depth, whole = "", 0, True
    for line in text.splitlines():
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
        elif line.startswith("\\SpecialChar LyX"):
            words.append("LyX" + line.removeprefix("\\SpecialChar LyX").strip())
        elif line.startswith(("\\SpecialChar LaTeX", "\\SpecialChar TeX")):
            words.append(line.removeprefix("\\SpecialChar ").strip())
        elif not line.startswith(("\\", "#", "<")):
            words.append(line)
        elif "\\SpecialChar" in line:
            whole = False
    return tuple(tuple(part) for part in sections if part)
