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

ENGLISH = "en"
_FOLDER = Path(__file__).parent / "languages"

# The one thing that every line of a report depends on: handed through sixty functions it would
# hide what they do. It is set around a whole report, and nowhere else.
_language: ContextVar[str] = ContextVar("language", default=ENGLISH)


def languages() -> tuple[str, ...]:
    """Codes of the languages there are, English first."""
    return (ENGLISH, *sorted(path.stem for path in _FOLDER.glob("*.yaml")))


@contextmanager
def spoken(code: str) -> Iterator[None]:
    """Say everything in this language within the block."""
    token = _language.set(code)
    try:
        yield
    finally:
        _language.reset(token)


def current() -> str:
    """Code of the language in use."""
    return _language.get()


def message(text: str) -> str:
    """Mark a constant as a message, to be said later."""
    return text


def say(text: str, /, **values: object) -> str:
    """A message in the language in use, its placeholders filled."""
    said = catalogue(_language.get()).get(text, text)
    return said.format(**values) if values else said


@cache
def catalogue(code: str) -> Mapping[str, str]:
    """English → this language; empty for English.

    Raises:
        KeyError: there is no such language.
    """
    if code == ENGLISH:
        return {}
    if code not in languages():
        raise KeyError(code)
    import yaml

    found: dict[str, str] = yaml.safe_load((_FOLDER / f"{code}.yaml").read_text(encoding="utf-8"))
    return found
