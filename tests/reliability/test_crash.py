"""Every stage killed, and refused by the disk, at every one of its operations."""

from __future__ import annotations

import errno
import random
import signal

import pytest
from crash import Trial, duration, fail, kill, kill_at_moment
from results import Results
from stage_cases import Cases

from so8tqc.llama.vendor import is_vendored

vendored = pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first")
BY_LLAMA = ("export", "quantize", "calibrate", "qc", "pipeline")


def case(name: str, *marks: pytest.MarkDecorator) -> object:
    """A parameter; what libllama takes part in needs it."""
    own = (vendored, pytest.mark.llama) if name in BY_LLAMA else ()
    return pytest.param(name, marks=[*own, *marks])


SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CRASH = pytest.mark.crash
FAST = ("bake", "quantize", "report")
SLOW = (
    "bake again", "run", "export", "calibrate", "qc", "longtext", "capture", "attest",
)  # fmt: skip
ALL = [case(name) for name in (*FAST, *SLOW)]
FULL_DISK = [
    case(name, *([] if name in ("bake", "report") else [CRASH])) for name in (*FAST, *SLOW)
]


THINNED = {"export": 3, "qc": 3, "longtext": 3, "pipeline": 6}
"""Where a try takes half a second and more, some disturbances come at every so many operations."""


def thinned(trial: Trial) -> tuple[str, range]:
    """The case's name, saying which operations are disturbed, and these."""
    name = trial.case.name
    step = THINNED.get(name, 1)
    return (f"{name}, every {step}th operation" if step > 1 else name), trial.points[::step]


def own_points(trial: Trial) -> list[int]:
    """The operations of the pipeline itself, without those of the bake that it runs."""
    return [at for at in trial.points if "baked_model" not in str(trial.trace[at - 1].path)]


@pytest.mark.parametrize(
    "name", [case("bake"), case("quantize"), case("report"), *(case(n, CRASH) for n in SLOW)]
)
def test_a_killed_command_leaves_nothing_half_and_goes_on(
    name: str, cases: Cases, results: Results
) -> None:
    trial = cases(name)
    for at in trial.points:
        kill(trial, at)
    results.add("killed", name, "SIGKILL", len(trial.points))


def test_a_killed_pipeline_remembers_what_is_done(cases: Cases, results: Results) -> None:
    trial = cases("run")
    points = own_points(trial)
    assert {trial.trace[at - 1].path.name for at in points} >= {"run", "bake"}
    for at in points:
        kill(trial, at)
    results.add("killed", "run, its own operations", "SIGKILL", len(points))


@pytest.mark.parametrize("name", FULL_DISK)
def test_a_full_disk_is_told_and_leaves_nothing(name: str, cases: Cases, results: Results) -> None:
    trial = cases(name)
    for at in trial.points:
        fail(trial, at, errno.ENOSPC, lasting=True)
    results.add("refused", name, "ENOSPC from there on", len(trial.points))


@CRASH
@pytest.mark.parametrize(
    ("number", "lasting"),
    [(errno.EIO, False), (errno.EROFS, True), (errno.EACCES, True)],
    ids=["EIO", "EROFS", "EACCES"],
)
@pytest.mark.parametrize("name", ALL)
def test_other_failures_are_told_as_well(
    name: str, number: int, lasting: bool, cases: Cases, results: Results
) -> None:
    trial = cases(name)
    tried, points = thinned(trial)
    for at in points:
        fail(trial, at, number, lasting=lasting)
    how = f"{errno.errorcode[number]} {'from there on' if lasting else 'once'}"
    results.add("refused", tried, how, len(points))


@CRASH
@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("name", ALL)
def test_an_interrupted_command_cleans_up_and_goes_on(
    name: str, signal_: signal.Signals, cases: Cases, results: Results
) -> None:
    trial = cases(name)
    tried, points = thinned(trial)
    for at in points:
        kill(trial, at, signal_=signal_)
    results.add("interrupted", tried, signal_.name, len(points))


@CRASH
@pytest.mark.parametrize("name", [case("pipeline")])
@pytest.mark.parametrize("signal_", SIGNALS, ids=[signal_.name for signal_ in SIGNALS])
def test_a_whole_pipeline_killed_at_its_operations(
    name: str, signal_: signal.Signals, cases: Cases, results: Results
) -> None:
    """Each signal at other operations, which lie between those of the others."""
    trial = cases(name)
    tried, points = thinned(trial)
    shift = SIGNALS.index(signal_) * points.step // len(SIGNALS)
    for at in trial.points[shift :: points.step]:
        kill(trial, at, signal_=signal_)
    kind = "killed" if signal_ == signal.SIGKILL else "interrupted"
    results.add(kind, tried, signal_.name, len(trial.points[shift :: points.step]))


@CRASH
@pytest.mark.parametrize("name", [case("pipeline")])
def test_a_pipeline_killed_at_random_moments_ends_as_if_it_had_not_been(
    name: str, cases: Cases, results: Results, request: pytest.FixtureRequest
) -> None:
    trial, moments = cases(name), random.Random(0)
    seconds = duration(trial)
    count = int(request.config.getoption("--crash-moments", 100))
    for _ in range(count):
        kill_at_moment(trial, moments.uniform(0.0, seconds), moments.choice(SIGNALS))
    results.add("random", name, "SIGKILL, SIGTERM or SIGINT", count)
