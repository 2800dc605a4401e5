"""The language of a report. English stands in the code; any other language is one YAML file.

A message is written as ``say("English with {placeholders}", placeholders=…)``. The file
``languages/CODE.yaml`` maps that English to the other language; what it lacks stays English.
A constant that is said later is marked where it stands, ``message("…")``. Records stay English
in every language.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

from so8tqc.languages import Language

_FOLDER = Path(__file__).parent / "languages"

# The one thing that every line of a report depends on: handed through sixty functions it would
# hide what they do. It is set around a whole report, and nowhere else.
_language: ContextVar[Language] = ContextVar("language", default=Language.ENGLISH)


@contextmanager
def spoken(language: Language) -> Iterator[None]:
    """Say everything in this language within the block."""
    token = _language.set(language)
    try:
        yield
    finally:
        _language.reset(token)


def current() -> Language:
    """The language in use."""
    return _language.get()


def message(text: str) -> str:
    """Mark a constant as a message, to be said later."""
    return text


def say(text: str, /, **values: object) -> str:
    """A message in the language in use, its placeholders filled."""
    said = catalogue(_language.get()).get(text, text)
    return said.format(**values) if values else said


@cache
def catalogue(language: Language) -> Mapping[str, str]:
    """English → this language; empty for English."""
    if language is Language.ENGLISH:
        return {}
    import yaml

    path = _FOLDER / f"{language}.yaml"
    found: dict[str, str] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found
