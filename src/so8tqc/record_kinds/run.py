"""Runs and reports: a row for each stage."""

from __future__ import annotations

from typing import NotRequired

from typing_extensions import TypedDict

from so8tqc.record_kinds.base import Metrics


class StageRow(TypedDict):
    """A stage's verdict, how many of its checks ended how, and its seconds."""

    name: NotRequired[str]
    verdict: str
    passed: int
    failed: int
    allowed: NotRequired[int]
    skipped: int
    seconds: float
    reused: bool


class RunMetrics(Metrics):
    """Of kind ``run``, and of ``report``, which has a ``language``."""

    name: str | None
    language: str | None = None
    stages: dict[str, StageRow]
