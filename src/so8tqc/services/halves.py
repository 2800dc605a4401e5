"""What it would take to halve the intervals of checks."""

from __future__ import annotations

from collections.abc import Iterable

from so8tqc.metrics.bootstrap import LEAST_TEXTS, texts_to_halve
from so8tqc.records import Check, Half


def with_halves(checks: Iterable[Check], texts: int, tokens: int) -> list[Check]:
    """The checks; those with an interval over texts say how many would make it half as wide.

    Args:
        checks: of one command.
        texts: that the intervals were drawn from.
        tokens: scored in them.
    """
    if texts < LEAST_TEXTS:
        return list(checks)
    more = texts_to_halve(texts)
    return _with(checks, Half(texts=more, tokens=round(tokens * more / texts)))


def with_halves_of_a_text(checks: Iterable[Check], tokens: int) -> list[Check]:
    """As :func:`with_halves`, for intervals over the blocks of one text: four times its tokens."""
    return _with(checks, Half(texts=None, tokens=4 * tokens))


def _with(checks: Iterable[Check], half: Half) -> list[Check]:
    return [c if c.ci95 is None else c.model_copy(update={"half": half}) for c in checks]
