"""Simultaneous paired intervals: the arithmetic, and what they promise in simulations."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from so8tqc.metrics.bootstrap import percentile_interval, quantile_interval, resample_weights
from so8tqc.metrics.paired import simultaneous_differences


def differences(candidates: np.ndarray) -> np.ndarray:
    """[texts, candidates] → [texts, pairs]."""
    columns = combinations(range(candidates.shape[1]), 2)
    return np.stack([candidates[:, a] - candidates[:, b] for a, b in columns], axis=1)


def test_the_interval_is_the_max_t_of_explicit_resamples() -> None:
    generator = np.random.default_rng(0)
    counts = generator.integers(50, 200, size=9).astype(float)
    sums = generator.normal([0.0, 5.0, -1.0], [3.0, 4.0, 0.01], size=(9, 3))
    found = simultaneous_differences(sums, counts, resamples=300, seed=4)

    def statistic(d: np.ndarray, n: np.ndarray) -> tuple[float, float]:
        theta = d.sum() / n.sum()
        residuals = d - theta * n
        return theta, np.sqrt(9 / 8 * (residuals**2).sum()) / n.sum()

    whole = [statistic(sums[:, j], counts) for j in range(3)]
    largest = []
    for weights in resample_weights(9, 300, 4):
        drawn = np.repeat(np.arange(9), weights.astype(int))
        ts = []
        for j, (theta, _) in enumerate(whole):
            value, error = statistic(sums[drawn, j], counts[drawn])
            ts.append(abs(value - theta) / error)
        largest.append(max(ts))
    critical = sorted(largest)[int(np.ceil(0.95 * 299))]
    assert found.critical == pytest.approx(critical)
    np.testing.assert_allclose(found.values, [theta for theta, _ in whole])
    np.testing.assert_allclose(found.low, [theta - critical * e for theta, e in whole])
    np.testing.assert_allclose(found.high, [theta + critical * e for theta, e in whole])
    exceeding = [(np.array(largest) >= abs(theta) / e).sum() for theta, e in whole]
    np.testing.assert_allclose(found.p, [(count + 1) / 301 for count in exceeding])


@pytest.mark.parametrize(("texts", "heavy"), [(6, False), (12, True), (25, False), (25, True)])
def test_among_equal_candidates_there_is_no_winner_in_95_percent_of_runs(
    texts: int, heavy: bool
) -> None:
    generator = np.random.default_rng(1)
    runs, without = 300, 0
    for run in range(runs):
        counts = generator.integers(60, 256, size=texts).astype(float)
        shared = generator.gamma(2, 1, size=(texts, 1))  # some texts are hard for everyone
        shape = (texts, 4)
        own = generator.lognormal(0, 0.8, shape) if heavy else generator.normal(1, 0.2, shape)
        sums = differences(0.05 * counts[:, None] * shared * own)
        found = simultaneous_differences(sums, counts, resamples=500, seed=run)
        without += not ((found.low > 0) | (found.high < 0)).any()
    assert without / runs >= 0.95


def test_a_true_difference_is_found_and_covered() -> None:
    generator = np.random.default_rng(2)
    seen = covered = 0
    for run in range(200):
        counts = generator.integers(60, 256, size=25).astype(float)
        means = np.array([0.05, 0.05, 0.08])
        own = generator.normal(means, 0.01, size=(25, 3)) * generator.gamma(20, 0.05, size=(25, 1))
        sums = differences(counts[:, None] * own)
        found = simultaneous_differences(sums, counts, resamples=500, seed=run)
        seen += bool((found.high[1:] < 0).all())
        truth = np.array([0.0, -0.03, -0.03])
        covered += bool(((found.low <= truth) & (truth <= found.high)).all())
    assert seen >= 190
    assert covered >= 186


def test_the_same_candidate_twice_does_not_differ() -> None:
    counts = np.full(8, 100.0)
    sums = np.zeros((8, 2))
    sums[:, 1] = np.random.default_rng(0).normal(size=8)
    found = simultaneous_differences(sums, counts, resamples=200, seed=0)
    assert (found.values[0], found.low[0], found.high[0], found.p[0]) == (0, 0, 0, 1)
    assert found.low[1] < found.high[1]


def test_four_texts_give_no_interval() -> None:
    found = simultaneous_differences(np.ones((4, 1)), np.ones(4), resamples=100, seed=0)
    assert found.values.tolist() == [1.0]
    assert np.isnan([found.low[0], found.high[0], found.p[0], found.critical]).all()


def test_the_interval_of_a_quantile_resamples_whole_texts() -> None:
    generator = np.random.default_rng(3)
    text = np.repeat(np.arange(7), [3, 9, 4, 6, 2, 8, 5])
    values = generator.gamma(1, 1, size=text.size)
    low, high = quantile_interval(values, text, 7, 0.9, resamples=200, seed=5)
    quantiles = []
    for weights in resample_weights(7, 200, 5):
        drawn = np.concatenate([np.tile(values[text == i], int(n)) for i, n in enumerate(weights)])
        quantiles.append(np.quantile(drawn, 0.9, method="inverted_cdf"))
    assert (low, high) == pytest.approx(percentile_interval(np.array(quantiles), 7))
    assert np.isnan(quantile_interval(values, text, 4, 0.9, resamples=200, seed=5)).all()


def test_a_difference_in_few_texts_has_no_interval_and_spoils_no_other() -> None:
    generator = np.random.default_rng(0)
    counts = np.full(12, 50.0)
    clear = generator.normal(5.0, 1.0, size=12)
    rare = np.zeros(12)
    rare[[2, 7]] = 1.0
    alone = simultaneous_differences(clear[:, None], counts, resamples=500, seed=0)
    both = simultaneous_differences(np.stack([clear, rare], 1), counts, resamples=500, seed=0)
    assert both.critical == alone.critical
    assert both.low[0] == alone.low[0] > 0
    assert np.isnan([both.low[1], both.high[1], both.p[1]]).all()
    assert both.values[1] == pytest.approx(2 / 600)
    # five texts are enough, and then it is heard
    rare[[0, 1, 4]] = 1.0
    heard = simultaneous_differences(np.stack([clear, rare], 1), counts, resamples=500, seed=0)
    assert np.isfinite(heard.low).all()
    assert heard.critical > alone.critical
