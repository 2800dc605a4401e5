"""Shares of hidden-state energy against numpy, scipy and theory; their change's interval."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.signal
import torch

from so8tqc.metrics.smoothness import ENERGY, HIGH, SINK_TOKENS, hidden_sums, mean_change, share
from so8tqc.rotations.pet import pet_penalty


def sums(hidden: np.ndarray) -> np.ndarray:
    return hidden_sums(torch.from_numpy(hidden))[None]


def test_shares_agree_with_the_penalty_and_with_scipys_periodogram() -> None:
    """D beyond one part of columns; a sink of 1e4 at the front does not count."""
    h = scipy.signal.lfilter([1], [1, -0.7], np.random.default_rng(0).normal(size=(505, 150)), 0)
    h += 3.0
    h[:SINK_TOKENS] = 1e4
    mask = torch.arange(505) >= SINK_TOKENS
    got = sums(h)
    assert got.shape == (1, 501, 3)
    penalty = float(pet_penalty(torch.from_numpy(h), mask=mask))
    assert share(got, ENERGY)[0] == pytest.approx(penalty, rel=1e-12)
    frequency, power = scipy.signal.periodogram(h[SINK_TOKENS:], axis=0, detrend=False)
    rest = power[frequency >= 0.25].sum() / power.sum()
    # scipy doubles every frequency but 0, as Parseval's theorem needs it
    assert share(got, HIGH)[0] == pytest.approx(rest, rel=1e-9)


def test_white_noise_and_slow_signals() -> None:
    noise = sums(np.random.default_rng(1).normal(size=(4000, 20)))
    assert share(noise, ENERGY)[0] == pytest.approx(6, rel=0.03)
    assert share(noise, HIGH)[0] == pytest.approx(0.5, rel=0.03)
    slow = sums(np.sin(np.arange(2004)[:, None] * np.linspace(0.01, 0.05, 8)))
    assert share(slow, ENERGY)[0] < 1e-4
    assert share(slow, HIGH)[0] < 1e-3


def test_a_change_has_the_right_size_and_its_interval_holds_it() -> None:
    """White noise plus a constant c: both shares are 1/(1 + c²) of their value without."""
    generator = np.random.default_rng(2)

    def layers(level: float) -> np.ndarray:
        return np.concatenate([sums(generator.normal(size=(2004, 16)) + level) for _ in range(3)])

    base, same, calmer = layers(1.0), layers(1.0), layers(1.1)
    expected = (1 + 1.0) / (1 + 1.21) - 1
    for column in (ENERGY, HIGH):
        change = mean_change(base, calmer, column, resamples=400, seed=0)
        assert change.relative == pytest.approx(expected, abs=0.02)
        assert change.ci95[0] < expected < change.ci95[1] < -0.05
        null = mean_change(base, same, column, resamples=400, seed=0)
        assert null.ci95[0] < 0 < null.ci95[1]
    by_layer = share(calmer, ENERGY) / share(base, ENERGY)
    assert mean_change(base, calmer, ENERGY, resamples=100, seed=0).relative == pytest.approx(
        float(np.exp(np.log(by_layer).mean())) - 1, rel=1e-12
    )


def test_too_few_tokens() -> None:
    with pytest.raises(ValueError, match="6 tokens: 7 are needed"):
        hidden_sums(torch.ones(6, 2))
