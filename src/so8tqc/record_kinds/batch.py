"""Batches: how each combination ended, and the files it judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NotRequired

from typing_extensions import TypedDict

from so8tqc.record_kinds.base import Interval, Metrics, OnThisMachine


class BatchFile(TypedDict):
    """A judged file of one run: its distance from the reference, nats and share of tokens."""

    bytes: int | None
    kl_mean: float | None
    kl_ci95: Interval | None
    top1: float | None
    verdict: str


class BatchRow(TypedDict):
    """How one combination ended.

    ``verdict`` is the run's, ``error`` where something stopped it, or ``not run``.
    """

    values: Mapping[str, object]
    directory: str
    verdict: str
    exit_code: int | None
    error: NotRequired[str]
    passed: NotRequired[int]
    failed: NotRequired[int]
    skipped: NotRequired[int]
    files: NotRequired[dict[str, BatchFile]]


class BatchMetrics(Metrics):
    """Of kind ``batch``; ``exit_code`` is the worst of all combinations'."""

    combinations: dict[str, BatchRow]
    exit_code: int


class BatchMeasured(OnThisMachine):
    """Of kind ``batch``: combination → its seconds, and its stages that were reused."""

    seconds: dict[str, float]
    reused: dict[str, list[str]]
