"""Candidate against candidate on the same tokens: of ``qc``, ``choose`` and ``comparison``."""

from __future__ import annotations

from typing import NotRequired

from typing_extensions import TypedDict

from so8tqc.record_kinds.base import Interval, Metrics


class Measure(TypedDict):
    """A's mean minus B's; ``better`` is the one whose advantage the interval supports."""

    difference: float
    ci95: Interval | None
    p: float | None
    better: str | None


class Pair(TypedDict):
    """Two candidates: KL to the reference, NLL of the text, share of the reference's top tokens."""

    a: str
    b: str
    kl: Measure
    nll: Measure
    top1: Measure
    winner: str | None
    sentence: NotRequired[str]


class Comparisons(TypedDict):
    """All pairs; ``critical``: of the max-T correction, None with too few texts."""

    method: NotRequired[str]
    texts: NotRequired[int]
    critical: NotRequired[float | None]
    pairs: list[Pair]


class ComparedMetrics(Metrics):
    """What the records of ``qc`` and ``choose`` have in common."""

    comparisons: Comparisons | None = None
