"""Words that enter records: how numbers, sizes and lists are written, in English.

Records are English in every language; pages that are read in another go through ``reports.format``.
"""

from __future__ import annotations

from collections.abc import Sequence

_LISTED = 5
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))

SMALLEST_UNIT = _UNITS[-1][0]
"""Bytes of the smallest unit; fewer are counted in words, which a page may translate."""


def size(count: float) -> str:
    """Bytes for people: ``112.1 MB``."""
    for factor, name in _UNITS:
        if count >= factor:
            return f"{count / factor:.1f} {name}"
    return f"{count:.0f} bytes"


def percent(share: float) -> str:
    """0.9987 → ``99.87 %``."""
    return f"{share:.2%}".replace("%", " %")


def counted(count: int, noun: str) -> str:
    """``1 text``, ``6,375 texts``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def listed(names: Sequence[str]) -> str:
    """``a, b``; of many the first five, and how many more; ``none`` of none."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more or "none"
