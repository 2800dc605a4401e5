"""Measured sentences in the language of a report: details of checks, findings, answers.

A record is English. What it says was written with numbers and names in it, so it is found again by
its pattern: ``sentences/CODE.yaml`` maps English with numbered holes to the other language with the
same holes. A text is taken sentence by sentence, the longest run that a pattern matches first, the
most specific pattern first; the words in a hole are sentences, too. What no pattern matches stays.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from so8tqc.languages import Language
from so8tqc.reports.language import catalogue, current

BOUNDARY = re.compile(r"(?<=[.;]) +")
"""Between two sentences of one text."""

TRIMMED = " .;,"
"""What is left out at both ends of a sentence before it is looked up."""

_FOLDER = Path(__file__).parent / "sentences"
_HOLE = re.compile(r"\{(\d+)\}")
_SPECIFIC = 8
"""Letters from which on a pattern is specific; the holes of a shorter one take one word each."""

_HEAD = re.compile(r"^([\d,]+ )?(.*?)(?: in (\S+))?$", re.DOTALL)
"""A count, words, and the name of what they are said of."""
_NAME = re.compile(r"[\w./-]+")
_CANDIDATES = ("baked",)
"""A word of an answer that in a hole is the name of the directory that a bake wrote."""

_ENDS = {".": "。", ";": "；", ",": "、"}


class _Pattern(NamedTuple):
    matches: re.Pattern[str]
    said: str
    letters: int


def measured(text: str) -> str:
    """A text of a record in the language in use, its numbers, names and commands as they are."""
    language = current()
    return text if language is Language.ENGLISH else _told(text, language)


@cache
def sentences(language: Language) -> dict[str, str]:
    """English with numbered holes → this language."""
    import yaml

    path = _FOLDER / f"{language}.yaml"
    found: dict[str, str] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


@cache
def _patterns(language: Language) -> list[_Pattern]:
    """The most specific, by its own letters, first."""
    found = [
        _Pattern(_expression(english), said, _letters(english))
        for english, said in sentences(language).items()
        if _HOLE.search(english)
    ]
    return sorted(found, key=lambda pattern: -pattern.letters)


def _letters(english: str) -> int:
    return sum(letter.isalpha() for letter in _HOLE.sub("", english))


def _expression(english: str) -> re.Pattern[str]:
    specific = english[0].isupper() or _letters(english) >= _SPECIFIC
    hole = "(.*?)" if specific else r"(\S+)"
    pieces = _HOLE.split(english)[::2]
    return re.compile(hole.join(re.escape(piece) for piece in pieces), re.DOTALL)


@lru_cache(maxsize=4096)
def _told(text: str, language: Language) -> str:
    """A text, the longest runs of its sentences that are known first."""
    if not any(letter.isalpha() for letter in text):
        return text
    edges = [0, *(match.end() for match in BOUNDARY.finditer(text)), len(text)]
    for count in range(len(edges) - 1, 0, -1):
        for start in range(len(edges) - count):
            here, there = edges[start], edges[start + count]
            said = _sentence(text[here:there], language)
            if said is not None:
                before, after = text[:here], text[there:]
                joined = said if after == "" or said.endswith(tuple(_ENDS.values())) else f"{said} "
                return (
                    f"{_told(before, language) if before else ''}{joined}"
                    f"{_told(after, language) if after else ''}"
                )
    return _after_colon(text, language)


def _after_colon(text: str, language: Language) -> str:
    """``3 tensors changed: a, b``, ``What is wrong in NAME: …``, where no pattern fits."""
    head, colon, rest = text.partition(": ")
    number, words, name = _HEAD.findall(head.strip(TRIMMED))[0]
    if not colon or (said := _known(words, language)) is None:
        return text
    counted = f"{number.strip()} 件：" if number else ""
    where = f"（{name}）" if name else ""
    return f"{counted}{said}{where}：{_told(rest, language)}"


def _sentence(text: str, language: Language) -> str | None:
    """One sentence with what stands at its ends; None if no pattern matches."""
    bare = text.strip(TRIMMED)
    said = _known(bare, language) if bare else None
    if said is None:
        return None
    start = text.index(bare)
    before, after = text[:start], text[start + len(bare) :].strip()
    lead = "".join(_ENDS.get(letter, letter) for letter in before.strip())
    return f"{lead}{said}{_ENDS.get(after, after)}"


def _known(bare: str, language: Language) -> str | None:
    for known in (sentences(language), catalogue(language)):
        if (said := known.get(bare) or known.get(f"{bare}.")) is not None:
            return said.removesuffix("。")
    for pattern in _patterns(language):
        if (found := pattern.matches.fullmatch(bare)) is not None:
            holes = [_hole(value, language) for value in found.groups()]
            return pattern.said.format(*holes)
    return None


def _hole(value: str, language: Language) -> str:
    """What stands in a hole: words are said, names and numbers stay."""
    if _NAME.fullmatch(value):
        word = None if value in _CANDIDATES else sentences(language).get(value)
        return word or (catalogue(language)[value] if value == "none" else value)
    said = _told(value, language)
    if said != value or ", " not in value:
        return said
    items = [_known(item, language) for item in value.split(", ")]
    if any(item is None for item in items):
        return value
    return "、".join(item for item in items if item is not None)
