"""The texts that a file is fitted to, none of which may judge it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from so8tqc.config import LONG_TEXTS, QUALITY_TEXTS
from so8tqc.errors import DataError
from so8tqc.sources.inputs.texts import Text, load_texts

JUDGES = (QUALITY_TEXTS, LONG_TEXTS)

_LEAST = 150
"""Characters of a paragraph that no two authors write alike."""


def calibration_texts(data: Sequence[str], judges: Sequence[str] = JUDGES) -> tuple[Text, ...]:
    """The texts of a list of files and built-in sets.

    Args:
        data: the files and sets.
        judges: sets of the texts that judge.

    Raises:
        DataError: one holds a text that judges, or a long paragraph of one, whatever its white
            space.
    """
    found = load_texts(data)
    judging = [(text.id, _plain(part)) for text in load_texts(judges) for part in _parts(text.text)]
    for text in found:
        plain = _plain(text.full)
        for judge, part in judging:
            if part in plain:
                raise DataError(
                    f"holds text of {judge}, which judges: a file fitted to it would be judged by "
                    "what it was made with",
                    where=f"{', '.join(data)}: {text.id}",
                    remedy="Give other calibration text, e.g. builtin:calibration.",
                )
    return found


def _parts(text: str) -> Iterator[str]:
    """A text, and its paragraphs that are long enough to be known again."""
    yield text
    yield from (part for part in text.split("\n\n") if len(_plain(part)) >= _LEAST)


def _plain(text: str) -> str:
    return " ".join(text.split())
