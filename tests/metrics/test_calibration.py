"""Calibration measures against direct formulas on full probabilities."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp, softmax

from so8tqc.metrics.calibration import (
    adaptive_calibration_error,
    bin_index,
    brier_score,
    calibration_error,
    calibration_sums,
    classwise_calibration_error,
    classwise_sums,
    equal_mass_edges,
    equal_width_edges,
    expected_calibration_error,
    negative_log_likelihood,
    reliability_bins,
)


def test_ece_by_hand() -> None:
    # two bins: (0, 0.5] holds 0.2 and 0.4, one of them right; (0.5, 1] holds 0.9, wrong
    confidence = np.array([0.2, 0.4, 0.9])
    correct = np.array([True, False, False])
    expected = (2 / 3) * abs(1 / 2 - 0.3) + (1 / 3) * abs(0 - 0.9)
    assert expected_calibration_error(confidence, correct, bins=2) == pytest.approx(expected)


def test_bins_are_open_below_and_closed_above() -> None:
    edges = equal_width_edges(4)
    assert bin_index(np.array([0.0, 0.25, 0.2500001, 0.5, 1.0]), edges).tolist() == [0, 0, 1, 1, 3]


def test_adaptive_ece_by_hand() -> None:
    # equal mass: {0.1, 0.2} and {0.3, 0.95}; equal width would put three in the first bin
    confidence = np.array([0.95, 0.1, 0.3, 0.2])
    correct = np.array([True, False, False, True])
    expected = 0.5 * abs(0.5 - 0.15) + 0.5 * abs(0.5 - 0.625)
    assert adaptive_calibration_error(confidence, correct, bins=2) == pytest.approx(expected)


def test_equal_mass_edges_hold_equal_numbers() -> None:
    confidence = np.random.default_rng(0).beta(2, 5, size=1500)
    counts = np.bincount(bin_index(confidence, equal_mass_edges(confidence, 15)), minlength=15)
    assert counts.min() >= 99
    assert counts.max() <= 101


def test_ties_share_a_bin() -> None:
    confidence = np.array([0.5] * 9 + [0.7])
    index = bin_index(confidence, equal_mass_edges(confidence, 5))
    assert len(set(index[:9].tolist())) == 1


def _naive_ece(confidence: np.ndarray, correct: np.ndarray, bins: int) -> float:
    total = 0.0
    edges = np.linspace(0, 1, bins + 1)
    for b in range(bins):
        inside = (confidence > edges[b]) & (confidence <= edges[b + 1])
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            total += inside.mean() * gap
    return total


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 200), st.integers(1, 30))
def test_ece_matches_the_textbook_and_ignores_order(seed: int, n: int, bins: int) -> None:
    generator = np.random.default_rng(seed)
    confidence = generator.uniform(1e-9, 1, n)
    correct = generator.uniform(size=n) < confidence
    value = expected_calibration_error(confidence, correct, bins)
    assert value == pytest.approx(_naive_ece(confidence, correct, bins), abs=1e-12)
    order = generator.permutation(n)
    for measure in (expected_calibration_error, adaptive_calibration_error):
        assert measure(confidence[order], correct[order], bins) == pytest.approx(
            measure(confidence, correct, bins), abs=1e-12
        )


def test_sums_of_groups_add_up_to_the_whole() -> None:
    generator = np.random.default_rng(1)
    confidence = generator.uniform(size=300)
    correct = generator.uniform(size=300) < 0.4
    group = generator.integers(0, 7, 300)
    sums = calibration_sums(confidence, correct, equal_width_edges(15), group, 8)
    assert sums.shape == (8, 16)
    assert sums[:, -1].tolist() == np.bincount(group, minlength=8).tolist()
    assert float(calibration_error(sums.sum(axis=0))) == pytest.approx(
        expected_calibration_error(confidence, correct)
    )
    one = group == 3
    assert float(calibration_error(sums[3])) == pytest.approx(
        expected_calibration_error(confidence[one], correct[one])
    )


def test_brier_and_nll_match_full_probabilities() -> None:
    generator = np.random.default_rng(2)
    z = generator.normal(size=(40, 30)) * 3
    y = generator.integers(0, 30, 40)
    each = np.arange(40)
    p = softmax(z, axis=1)
    onehot = np.eye(30)[y]
    np.testing.assert_allclose(
        brier_score((p**2).sum(axis=1), p[each, y]), ((p - onehot) ** 2).sum(axis=1), rtol=1e-12
    )
    np.testing.assert_allclose(
        negative_log_likelihood(logsumexp(z, axis=1), z[each, y]),
        -log_softmax(z, axis=1)[each, y],
        rtol=1e-12,
    )


def test_reliability_bins_reproduce_ece() -> None:
    generator = np.random.default_rng(3)
    confidence = generator.uniform(0.3, 1, 500)
    correct = generator.uniform(size=500) < confidence**2
    data = reliability_bins(confidence, correct, 15)
    assert int(data.count.sum()) == 500
    assert np.isnan(data.accuracy[0])
    assert data.count[0] == 0
    filled = data.count > 0
    ece = (data.count * np.abs(data.accuracy - data.confidence))[filled].sum() / 500
    assert ece == pytest.approx(expected_calibration_error(confidence, correct))


def _naive_classwise(p: np.ndarray, y: np.ndarray, classes: list[int], bins: int) -> float:
    """Kull et al. 2019, eq. 4, word by word, over some classes."""
    total = 0.0
    edges = np.linspace(0, 1, bins + 1)
    for c in classes:
        for b in range(bins):
            inside = (p[:, c] > edges[b]) & (p[:, c] <= edges[b + 1])
            if inside.any():
                total += inside.mean() * abs((y[inside] == c).mean() - p[inside, c].mean())
    return total / len(classes)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 100), st.integers(1, 20))
def test_classwise_ece_matches_the_textbook(seed: int, n: int, bins: int) -> None:
    generator = np.random.default_rng(seed)
    p = softmax(generator.normal(size=(n, 8)) * 2, axis=1)
    y = generator.integers(0, 8, n)
    classes = [5, 0, 3]
    target = np.array([classes.index(v) if v in classes else -1 for v in y])
    assert classwise_calibration_error(p[:, classes], target, bins) == pytest.approx(
        _naive_classwise(p, y, classes, bins), abs=1e-12
    )


def test_classwise_sums_of_texts_add_up() -> None:
    generator = np.random.default_rng(4)
    p = softmax(generator.normal(size=(90, 3)), axis=1)
    target = generator.integers(-1, 3, 90)
    text = np.repeat(np.arange(3), 30)
    sums = classwise_sums(p, target, equal_width_edges(15), text, 3)
    assert sums.shape == (3, 3 * 15 + 1)
    assert sums[:, -1].tolist() == [30.0, 30.0, 30.0]
    assert float(calibration_error(sums.sum(axis=0))) / 3 == pytest.approx(
        classwise_calibration_error(p, target)
    )
