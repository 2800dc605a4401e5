"""Comparisons of two runs: of each kind of thing what differs."""

from __future__ import annotations

from typing import Literal

from pydantic import JsonValue
from typing_extensions import TypedDict

from so8tqc.record_kinds.base import Interval, Metrics
from so8tqc.record_kinds.pairs import Comparisons

Outcome = Literal["equal", "better", "worse", "undecided", "not comparable"]


class Side(TypedDict):
    """One of the two runs."""

    directory: str
    verdict: str
    started: str
    stages: list[str]


class Change(TypedDict):
    """A named value of both runs; None where a run has none."""

    name: str
    a: JsonValue
    b: JsonValue


class FileSide(TypedDict):
    """A file in one of the runs."""

    path: str
    sha256: str
    bytes: int


class FileChange(TypedDict):
    """An input or output of both runs, and the stages that name it."""

    role: str
    name: str
    stages: list[str]
    a: FileSide | None
    b: FileSide | None


class VerdictChange(TypedDict):
    """A check that ended otherwise, or that only one run has (None)."""

    stage: str
    id: str
    subject: str
    a: str | None
    b: str | None
    detail: str


class ValueSide(TypedDict):
    """What a check measured in one of the runs."""

    value: float
    ci95: Interval | None


class Value(TypedDict):
    """What a check measured in both runs, and what can be said of the difference.

    ``outcome`` is of B against A: ``equal``; ``better`` or ``worse``, where the data support it;
    ``undecided``, where they do not; ``not comparable``, where there is nothing to tell it by.
    ``how`` says by what.
    """

    stage: str
    id: str
    subject: str
    unit: str
    a: ValueSide
    b: ValueSide
    difference: float
    ci95: Interval | None
    outcome: Outcome
    how: str


class Same(TypedDict):
    """How many of each are equal."""

    values: int
    files: int


class TokenByToken(TypedDict):
    """Token tables compared: ``reason`` why they could not be, ``note`` what to know of it."""

    reason: str | None
    note: str
    comparisons: Comparisons | None


class ComparisonMetrics(Metrics):
    """Of kind ``comparison``."""

    a: Side
    b: Side
    changed: bool
    config: list[Change]
    versions: list[Change]
    files: list[FileChange]
    verdicts: list[VerdictChange]
    values: list[Value]
    same: Same
    paired: TokenByToken
