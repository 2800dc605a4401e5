"""Every stage killed, and refused by the disk, at every one of its operations."""

from __future__ import annotations

import errno
import random
import signal

import pytest
from crash import Trial, duration, fail, kill, kill_at, kill_at_moment
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
NAMES = (
    "bake",
    "bake again",
    "run",
    "report",
    "export",
    "quantize",
    "calibrate",
    "qc",
    "longtext",
    "capture",
    "attest",
)
ALL = [case(name) for name in NAMES]
ERRORS = {errno.ENOSPC: True, errno.EIO: False, errno.EROFS: True, errno.EACCES: True}
"""Number → whether it lasts: once a sector cannot be written, or the whole disk from there on."""

THINNED = {"export": 3, "qc": 3, "longtext": 3, "pipeline": 24}
"""Where a try takes half a second and more, some disturbances come at every so many operations."""


def thinned(trial: Trial) -> tuple[str, range]:
    """The case's name, saying which operations are disturbed, and these."""
    name = trial.case.name
    step = THINNED.get(name, 1)
    return (f"{name}, one in {step} operations" if step > 1 else name), trial.points[::step]


@pytest.mark.parametrize("name", ALL)
def test_a_command_stands_each_disturbance_somewhere(name: str, cases: Cases) -> None:
    """What the tests below do everywhere: the places, and of slow commands what is done there, are
    chosen once and for all."""
    trial, chosen = cases(name), random.Random(name)
    few = 1 if name in THINNED else None
    for signal_ in chosen.sample(SIGNALS, few or len(SIGNALS)):
        kill(trial, chosen.choice(trial.points), signal_=signal_)
    for number in chosen.sample(sorted(ERRORS), few or len(ERRORS)):
        fail(trial, chosen.choice(trial.points), number, lasting=ERRORS[number])


@CRASH
@pytest.mark.parametrize("name", ALL)
def test_a_killed_command_leaves_nothing_half_and_goes_on(
    name: str, cases: Cases, results: Results
) -> None:
    trial = cases(name)
    kill_at(trial, trial.points, signal.SIGKILL)
    results.add("killed", name, "SIGKILL", len(trial.points))


@CRASH
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("number", ERRORS, ids=[errno.errorcode[number] for number in ERRORS])
def test_a_disk_that_refuses_is_told_of_and_leaves_nothing(
    name: str, number: int, cases: Cases, results: Results
) -> None:
    trial = cases(name)
    tried, points = (name, trial.points) if number == errno.ENOSPC else thinned(trial)
    for at in points:
        fail(trial, at, number, lasting=ERRORS[number])
    how = f"{errno.errorcode[number]} {'from there on' if ERRORS[number] else 'once'}"
    results.add("refused", tried, how, len(points))


@CRASH
@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("name", ALL)
def test_an_interrupted_command_cleans_up_and_goes_on(
    name: str, signal_: signal.Signals, cases: Cases, results: Results
) -> None:
    trial = cases(name)
    tried, points = thinned(trial)
    kill_at(trial, points, signal_)
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
    kill_at(trial, trial.points[shift :: points.step], signal_)
    kind = "killed" if signal_ == signal.SIGKILL else "interrupted"
    results.add(kind, tried, signal_.name, len(trial.points[shift :: points.step]))


@CRASH
@pytest.mark.parametrize("name", [case("pipeline")])
def test_a_pipeline_killed_at_random_moments_ends_as_if_it_had_not_been(
    name: str, cases: Cases, results: Results, request: pytest.FixtureRequest
) -> None:
    """A moment after the end, as a run may be faster than the one measured, does not count."""
    trial, moments = cases(name), random.Random(0)
    seconds = duration(trial)
    count = int(request.config.getoption("--crash-moments", 100))
    ended = 0
    for _ in range(2 * count):
        if ended < count:
            moment, signal_ = moments.uniform(0.0, seconds), moments.choice(SIGNALS)
            ended += kill_at_moment(trial, moment, signal_)
    assert ended == count
    results.add("random", name, "SIGKILL, SIGTERM or SIGINT", count)
