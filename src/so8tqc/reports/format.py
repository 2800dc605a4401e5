"""How numbers are written in reports."""

from __future__ import annotations

from collections.abc import Sequence

from so8tqc import wording
from so8tqc.records import Check, Half
from so8tqc.reports.language import message, say
from so8tqc.wording import SMALLEST_UNIT

_COUNTED = {
    "text": (message("{count} text"), message("{count} texts")),
    "long text": (message("{count} long text"), message("{count} long texts")),
    "token": (message("{count} token"), message("{count} tokens")),
    "check": (message("{count} check"), message("{count} checks")),
    "stage": (message("{count} stage"), message("{count} stages")),
    "file": (message("{count} file"), message("{count} files")),
}


def number(value: float | None) -> str:
    """Four significant digits; small integers as they are; – for nothing."""
    if value is None:
        return "–"
    if value != value:  # noqa: PLR0124  NaN
        return "NaN"
    if float(value).is_integer() and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.4g}"


def half(found: Half | None) -> str:
    """What would halve an interval; "" where nobody knows."""
    if found is None:
        return ""
    tokens = counted(found.tokens, "token")
    if found.texts is None:
        return say("half as wide: {tokens}", tokens=tokens)
    texts = counted(found.texts, "text")
    return say("half as wide: {texts}, {tokens}", texts=texts, tokens=tokens)


def interval(ci95: tuple[float, float] | None) -> str:
    """``0.01 … 0.02``, empty if there is none."""
    return "" if ci95 is None else f"{number(ci95[0])} … {number(ci95[1])}"


def limit(check: Check) -> str:
    """``≤ 0.01``."""
    if check.limit is None:
        return "–"
    sign = {"<=": "≤", ">=": "≥", "==": "="}.get(check.comparison, check.comparison)
    return f"{sign} {number(check.limit)}"


def target(check: Check) -> str:
    """``1e-06, met``, empty if there is no absolute target."""
    if check.target is None:
        return ""
    met = say("{target}, met", target=number(check.target))
    return met if check.target_met else say("{target}, not met", target=number(check.target))


def size(count: float) -> str:
    """Bytes for people: ``112.1 MB``."""
    if count < SMALLEST_UNIT:
        return say("{count} bytes", count=f"{count:.0f}")
    return wording.size(count)


def counted(count: int, noun: str) -> str:
    """``1 text``, ``6,375 tokens``."""
    one, many = _COUNTED.get(noun, (f"{{count}} {noun}", f"{{count}} {noun}s"))
    return say(one if count == 1 else many, count=f"{count:,}")


def ranges(layers: Sequence[int]) -> str:
    """(0, 1, 2, 5) → ``0–2, 5``."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(f"{p[0]}–{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
