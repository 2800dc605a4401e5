"""Records: what a stage did, measured and concluded. Frozen, versioned, JSON.

Every report is a pure function of records; nothing else is passed to it. All
that may differ between two runs with the same inputs (time, duration, memory)
sits in ``Record.run``.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from so8tqc.errors import ConfigError

SCHEMA_VERSION: Literal[1] = 1


class Frozen(BaseModel):
    """A record part: immutable, closed against unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Verdict(StrEnum):
    """Outcome of a check or of a whole stage."""

    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    SKIP = "skip"


class Half(Frozen):
    """What it would take to halve an interval: as much in all of what was measured.

    ``texts``: None where they are not what was drawn from, but the tokens of one text.
    """

    texts: int | None
    tokens: int


class Check(Frozen):
    """One measured value against one limit.

    Attributes:
        id: stable dotted name, e.g. ``kl.mean``; other tools may rely on it.
        group: the part before the dot.
        subject: which candidate, file or case is judged ("" when there is only one).
        value: what was measured, in ``unit``; None only when skipped.
        limit: what it was judged against.
        comparison: how value must stand to limit.
        verdict: pass, fail, or skip (then ``detail`` says why).
        ci95: 95 % interval of the value, where one exists.
        target: the absolute target, shown whatever the limit was.
        target_met: whether the absolute target was met too.
        noise_floor: the error that correct rounding alone causes, measured.
        allowed: it did not pass, and does not count for the verdict, as the user asked.
        detail: a sentence for people.
    """

    id: str
    group: str
    subject: str = ""
    value: float | None
    limit: float | None
    comparison: Literal["<=", ">=", "<", ">", "=="] = "<="
    unit: str = ""
    verdict: Verdict
    ci95: tuple[float, float] | None = None
    half: Half | None = None
    target: float | None = None
    target_met: bool | None = None
    noise_floor: float | None = None
    allowed: bool = False
    detail: str

    @property
    def failed(self) -> bool:
        """Whether it fails the stage's verdict."""
        return self.verdict is Verdict.FAIL and not self.allowed


class Diagnosis(Frozen):
    """What was done instead of what should have been done, and how to mend it."""

    code: str
    layers: tuple[int, ...] = ()
    text: str
    remedy: str


class FileRef(Frozen):
    """A named input or output: a file (sha256 of its bytes) or a directory (of its parts).

    ``source``: ``org/name@commit``, where it lies in the cache of a hub.
    """

    path: str
    sha256: str
    bytes: int
    source: str | None = None


class RunInfo(Frozen):
    """Everything about a run that does not follow from its inputs.

    ``measured`` holds what depends on this machine, such as tokens per second. ``started`` is
    the date of ``SOURCE_DATE_EPOCH``, where that is set.
    """

    started: datetime
    seconds: float
    peak_rss_bytes: int | None = None
    reused: bool = False
    measured: dict[str, JsonValue] = Field(default_factory=dict)


class Record(Frozen):
    """What one stage did. Serialised as ``record.json`` beside the stage's outputs.

    ``metrics`` holds the stage's own measurements as plain JSON; ``record_kinds`` has
    the structure of each kind, which the service writes and whoever reads it validates.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: str
    verdict: Verdict
    checks: tuple[Check, ...] = ()
    metrics: dict[str, JsonValue] = Field(default_factory=dict)
    diagnosis: tuple[Diagnosis, ...] = ()
    notices: tuple[str, ...] = ()
    inputs: dict[str, FileRef] = Field(default_factory=dict)
    outputs: dict[str, FileRef] = Field(default_factory=dict)
    config: dict[str, JsonValue] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    run: RunInfo

    def check(self, check_id: str, subject: str | None = None) -> Check:
        """The check with this id (and subject, where several candidates were judged).

        Raises:
            KeyError: there is none.
        """
        for check in self.checks:
            if check.id == check_id and subject in (None, check.subject):
                return check
        raise KeyError(check_id)


def judge(
    check_id: str,
    value: float,
    limit: float,
    *,
    detail: str,
    comparison: Literal["<=", ">=", "<", ">", "=="] = "<=",
    subject: str = "",
    unit: str = "",
    ci95: tuple[float, float] | None = None,
    target: float | None = None,
    noise_floor: float | None = None,
) -> Check:
    """Compare a value with its limit. NaN satisfies nothing, so it always fails."""
    return Check(
        id=check_id,
        group=check_id.split(".", 1)[0],
        subject=subject,
        value=value,
        limit=limit,
        comparison=comparison,
        unit=unit,
        verdict=Verdict.PASS if _holds(value, comparison, limit) else Verdict.FAIL,
        ci95=ci95,
        target=target,
        target_met=None if target is None else _holds(value, comparison, target),
        noise_floor=noise_floor,
        detail=detail,
    )


def skipped(check_id: str, reason: str, *, subject: str = "") -> Check:
    """A check that could not be computed, with the reason."""
    return Check(
        id=check_id,
        group=check_id.split(".", 1)[0],
        subject=subject,
        value=None,
        limit=None,
        verdict=Verdict.SKIP,
        detail=reason,
    )


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Fail if any failed; skip if nothing was judged; else pass."""
    found = set(verdicts)
    if Verdict.FAIL in found:
        return Verdict.FAIL
    return Verdict.PASS if Verdict.PASS in found else Verdict.SKIP


def overall(checks: Iterable[Check]) -> Verdict:
    """The worst verdict of the checks that count."""
    return worst(check.verdict for check in checks if not check.allowed)


def _holds(value: float, comparison: str, limit: float) -> bool:
    match comparison:
        case "<=":
            return value <= limit
        case ">=":
            return value >= limit
        case "<":
            return value < limit
        case ">":
            return value > limit
        case _:
            return value == limit


class Stopwatch:
    """Times a stage and reads the process's peak memory for its record.

    Raises:
        ConfigError: ``SOURCE_DATE_EPOCH`` is set, and no date.
    """

    def __init__(self) -> None:
        self.started = _today()
        self._began = time.monotonic()

    def info(self) -> RunInfo:
        """Run information up to now."""
        elapsed = time.monotonic() - self._began
        return RunInfo(started=self.started, seconds=elapsed, peak_rss_bytes=_peak_rss_bytes())


def _today() -> datetime:
    """Now, unless ``SOURCE_DATE_EPOCH`` says when (reproducible-builds.org)."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH")
    if not seconds:
        return datetime.now(UTC)
    try:
        return datetime.fromtimestamp(int(seconds), UTC)
    except (ValueError, OverflowError, OSError):
        raise ConfigError(f"SOURCE_DATE_EPOCH is no number of seconds: {seconds!r}") from None


def _peak_rss_bytes() -> int | None:
    """High-water mark of this process's resident memory, bytes (None where unknown)."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


ABSENT = "absent"
"""The version of what is not installed."""


def versions(*distributions: str) -> dict[str, str]:
    """Installed versions of this package and the given distributions ("absent" if missing)."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str] = {"python": platform.python_version()}
    for name in ("so8tqc", *distributions):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ABSENT
    return found


def jsonable(value: Any) -> JsonValue:
    """Plain JSON of numpy scalars, arrays, tensors, models and containers."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(v) for v in value]
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    plain = value is None or isinstance(value, (str, int, float, bool))
    if not plain or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)  # JSON has no NaN and no infinity
    return value  # type: ignore[no-any-return]
