"""The online chart against its theory: run lengths, independence, delays; and the loop watch."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import scipy.signal
import scipy.stats

from so8tqc.metrics.oscillation import indices
from so8tqc.metrics.sequential import (
    LARGEST_SCORE,
    LoopWatch,
    OscillationChart,
    average_run_length,
    threshold_for,
)


def exact_run_length(h: float, k: float, nodes: int = 200) -> float:
    """Page's equation L(s) = 1 + L(0) Φ(k − s) + ∫₀ʰ L(u) φ(u + k − s) du, by quadrature."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    u, w = np.concatenate([[0.0], (x + 1) * h / 2]), np.concatenate([[0.0], w * h / 2])
    kernel = scipy.stats.norm.pdf(u[None] + k - u[:, None]) * w
    kernel[:, 0] += scipy.stats.norm.cdf(k - u)
    return float(np.linalg.solve(np.eye(u.size) - kernel, np.ones(u.size))[0])


@pytest.mark.parametrize(
    ("h", "k", "within"), [(4.0, 0.5, 0.01), (7.0, 0.5, 0.01), (8.0, 0.25, 0.01), (4.0, 1.0, 0.06)]
)
def test_run_lengths_are_those_of_pages_integral_equation(
    h: float, k: float, within: float
) -> None:
    assert average_run_length(h, k) == pytest.approx(exact_run_length(h, k), rel=within)


@pytest.mark.parametrize("wanted", [50.0, 6250.0, 1e9])
def test_the_threshold_gives_the_run_length_wanted(wanted: float) -> None:
    assert average_run_length(threshold_for(wanted, 0.5), 0.5) == pytest.approx(wanted)


def test_scores_are_independent_standard_normal_whatever_the_series() -> None:
    """Exactly so for normal y, the self-starting chart's claim."""
    generator = np.random.default_rng(0)
    scores = []
    for _ in range(400):
        chart = OscillationChart()
        ys = generator.normal(size=12) * generator.uniform(0.1, 9) + generator.normal() * 50
        row = []
        for y in ys:
            row.append(chart._score(float(y)))
            chart._learn(float(y))
        assert row[:2] == [None, None]
        scores.append(row[2:])
    u = np.array(scores, dtype=float)
    assert scipy.stats.kstest(u.ravel(), "norm").pvalue > 0.01
    correlation = np.corrcoef(u.T)
    assert np.abs(correlation[~np.eye(10, dtype=bool)]).max() < 0.2  # 4 sd of 400 pairs


def test_scores_agree_with_scipys_students_t() -> None:
    ys = np.random.default_rng(1).normal(size=9)
    chart = OscillationChart()
    for n, y in enumerate(ys, start=1):
        got = chart._score(float(y))
        if n > 2:
            before = ys[: n - 1]
            t = (y - before.mean()) / before.std(ddof=1) * np.sqrt((n - 1) / n)
            expected = scipy.stats.norm.ppf(scipy.stats.t.cdf(t, n - 2))
            assert got == pytest.approx(np.clip(expected, -4, 4), abs=1e-9)
        chart._learn(float(y))


@pytest.mark.parametrize("statistic", ["index", "von_neumann"])
def test_batches_are_summarised_as_numpy_does(statistic: str) -> None:
    """A level of 1e8 must cost nothing: no difference of large sums."""
    x = np.random.default_rng(2).normal(size=2 + 3 * 16) + 1e8
    chart = OscillationChart(statistic)  # type: ignore[arg-type]
    got = [y for value in x if (y := chart._take(float(value))) is not None]
    expected = []
    for i in range(3):
        batch = x[2 + 16 * i : 2 + 16 * (i + 1)]
        around = x[16 * i : 2 + 16 * (i + 1)]
        expected.append(
            {
                "index": np.abs(np.diff(around, n=2)).mean(),
                "von_neumann": np.square(np.diff(around)[1:]).sum()
                / np.square(batch - batch.mean()).sum(),
            }[statistic]
        )
    np.testing.assert_allclose(np.exp(got), expected, rtol=1e-6)


def test_one_long_batch_is_the_index_of_the_whole_series() -> None:
    x = np.random.default_rng(3).normal(size=200)
    chart = OscillationChart(batch=198)
    (y,) = (y for value in x if (y := chart._take(float(value))) is not None)
    assert math.exp(y) * 198 / 200 == pytest.approx(indices(x)["index"])


def alarms_of(chart: OscillationChart, series: np.ndarray) -> list[int]:
    return [i for i, x in enumerate(series) if chart.update(float(x))]


def ar1(generator: np.random.Generator, size: int, phi: float) -> np.ndarray:
    return scipy.signal.lfilter([1], [1, -phi], generator.normal(size=size + 50))[50:]


def test_false_alarms_come_as_rarely_as_promised() -> None:
    """200 runs over 2,048 tokens with a run length of 20,000: binomial bound on the share with an
    alarm, of which theory expects 1 − exp(−2048/20000) = 10 %."""
    generator = np.random.default_rng(4)
    found = sum(
        bool(alarms_of(OscillationChart(run_length=20_000), ar1(generator, 2048, 0.5)))
        for _ in range(200)
    )
    expected = 1 - math.exp(-2048 / 20_000)
    low, high = scipy.stats.binom.interval(0.999, 200, expected)
    assert low <= found <= high


@pytest.mark.parametrize("statistic", ["index", "von_neumann"])
def test_an_oscillation_that_begins_is_found_soon(statistic: str) -> None:
    generator = np.random.default_rng(5)
    delays = []
    for _ in range(30):
        x = ar1(generator, 1500, 0.5)
        x[1000:] += 1.5 * np.where(np.arange(500) % 2, 1.0, -1.0)
        found = [i for i in alarms_of(OscillationChart(statistic), x) if i >= 1000]  # type: ignore[arg-type]
        delays.append(found[0] - 1000 if found else math.inf)
    assert np.median(delays) <= 100
    assert max(delays) < 400


def test_what_oscillates_from_the_start_needs_a_reference() -> None:
    generator = np.random.default_rng(6)
    alternating = 3 * np.where(np.arange(512) % 2, 1.0, -1.0)
    x = ar1(generator, 512, 0.5) + alternating
    assert alarms_of(OscillationChart(), x) == []
    informed = OscillationChart()
    informed.learn(ar1(generator, 512, 0.5))
    found = alarms_of(informed, x)
    assert len(found) == 1  # one episode, one alarm
    assert found[0] < 80
    assert informed.raised


def test_an_episode_ends_and_the_next_is_reported() -> None:
    generator = np.random.default_rng(7)
    x = ar1(generator, 4000, 0.5)
    for start in (1000, 2500):
        x[start : start + 400] *= np.where(np.arange(400) % 2, 4.0, -4.0)
    found = alarms_of(OscillationChart(), x)
    assert len(found) == 2
    assert 1000 <= found[0] < 1400
    assert 2500 <= found[1] < 2900


def test_nothing_is_learnt_from_an_alarm() -> None:
    """However long an episode is, it does not become what is usual."""
    generator = np.random.default_rng(13)
    x = ar1(generator, 6000, 0.5)
    x[1000:5000] += 3 * np.where(np.arange(4000) % 2, 1.0, -1.0)
    chart = OscillationChart()
    assert len(alarms_of(chart, x[:1200])) == 1
    usual = chart._mean
    assert alarms_of(chart, x[1200:5000]) == []
    assert chart.raised
    assert chart._mean == usual
    alarms_of(chart, x[5000:])
    assert not chart.raised


def test_a_single_spike_is_no_oscillation() -> None:
    x = ar1(np.random.default_rng(8), 600, 0.5)
    x[300] += 1000
    chart = OscillationChart()
    assert alarms_of(chart, x) == []
    assert chart.threshold > LARGEST_SCORE


def test_series_without_any_variation() -> None:
    chart = OscillationChart()
    assert alarms_of(chart, np.zeros(500)) == []
    assert alarms_of(chart, ar1(np.random.default_rng(9), 500, 0.5)) == []
    assert alarms_of(chart, np.zeros(500)) == []
    assert math.isfinite(chart.level)


def test_memory_does_not_grow() -> None:
    generator = np.random.default_rng(10)
    chart, watch = OscillationChart(), LoopWatch()
    sizes = []
    for _ in range(2):
        for x in generator.normal(size=3000):
            chart.update(float(x))
            watch.update(int(abs(x) * 1000))
        sizes.append(len(pickle.dumps((chart.__dict__, watch.__dict__))))
    assert sizes[1] <= sizes[0] + 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistic": "variance"}, "no statistic"),
        ({"batch": 3}, "at least 4"),
        ({"slack": 0.0}, "slack"),
        ({"run_length": 1.0}, "no threshold"),
        ({"run_length": math.nan}, "no threshold"),
    ],
)
def test_impossible_charts(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OscillationChart(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="a value of the series is"):
        OscillationChart().update(value)


@pytest.mark.parametrize("period", [1, 2, 7, 60, 128])
def test_a_loop_is_found_when_it_stands_there_often_enough(period: int) -> None:
    generator = np.random.default_rng(11)
    head = generator.integers(0, 1000, size=300)
    body = generator.permutation(1000)[:period] + 1000
    tokens = [*head, *np.resize(body, 3 * 128 + 64)]
    watch = LoopWatch()
    found = [i for i, token in enumerate(tokens) if watch.update(int(token))]
    assert found == [300 + period + max(64, 2 * period) - 1]
    assert watch.period == period


def test_text_that_repeats_little_is_no_loop_and_loops_end() -> None:
    generator = np.random.default_rng(12)
    watch = LoopWatch()
    twice = np.tile(generator.integers(0, 1000, size=100), 2)
    dashes = [5] * 60
    assert not any(watch.update(int(t)) for t in [*twice, *dashes, *twice])
    assert any(watch.update(7) for _ in range(100))
    assert watch.period == 1
    watch.update(8)
    assert watch.period == 0


def test_what_was_only_remembered_is_not_counted() -> None:
    watch = LoopWatch(longest_period=4, copies=2, least_run=8)
    watch.remember([1, 2] * 50)
    assert [watch.update(t) for t in [1, 2] * 4] == [False] * 7 + [True]
    with pytest.raises(ValueError, match="a loop needs"):
        LoopWatch(copies=1)
