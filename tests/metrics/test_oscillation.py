"""Series indices and spectra: known series, planted changes, false alarms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.signal
import scipy.stats

from so8tqc.metrics.oscillation import changes, high_variance, indices, slope
from so8tqc.metrics.spectra import (
    benjamini_hochberg,
    nearest_wavelength,
    rope_wavelengths,
    spectrum,
)


def test_indices_of_known_series() -> None:
    noise = np.random.default_rng(0).normal(size=20_000)
    white = indices(noise)
    assert white["von_neumann"] == pytest.approx(2.0, rel=0.05)
    assert white["high_frequency"] == pytest.approx(0.5, rel=0.05)
    assert white["index"] == pytest.approx(np.sqrt(6) * np.sqrt(2 / np.pi), rel=0.05)
    alternating = indices(np.tile([1.0, -1.0], 500))
    assert alternating["von_neumann"] == pytest.approx(4.0, rel=0.01)
    assert alternating["high_frequency"] == pytest.approx(1.0, rel=0.01)
    smooth = indices(np.sin(np.arange(1000) / 50))
    assert smooth["von_neumann"] < 0.01
    assert smooth["high_frequency"] < 0.01


def test_high_frequency_share_agrees_with_scipys_periodogram() -> None:
    x = scipy.signal.lfilter([1], [1, -0.6], np.random.default_rng(1).normal(size=4096))
    frequency, power = scipy.signal.periodogram(x, detrend="linear")
    expected = power[frequency >= 0.25].sum() / power.sum()
    assert indices(x)["high_frequency"] == pytest.approx(expected, rel=1e-3)


def test_equal_series_have_no_change_and_a_planted_one_is_found() -> None:
    generator = np.random.default_rng(2)
    x = scipy.signal.lfilter([1], [1, -0.8], generator.normal(size=2048))
    same = changes(x, x + generator.normal(size=2048) * 1e-4, resamples=500, seed=0)
    for change in same.values():
        assert change.ci95[0] < 0.01
        assert abs(change.relative) < 0.01
    louder = changes(x, x + generator.normal(size=2048) * 0.5, resamples=500, seed=0)
    for change in louder.values():
        assert change.ci95[0] > 0.05


def test_change_intervals_cover_zero_under_the_null() -> None:
    generator = np.random.default_rng(3)
    alarms = 0
    for run in range(60):
        common = scipy.signal.lfilter([1], [1, -0.7], generator.normal(size=1024))
        a = common + generator.normal(size=1024) * 0.3
        b = common + generator.normal(size=1024) * 0.3
        change = changes(a, b, resamples=300, seed=run)["index"]
        alarms += change.ci95[0] > 0.05
    assert alarms <= 3


@pytest.mark.parametrize("length", [63, 127, 255])
def test_intervals_of_short_series_cover_what_they_should(length: int) -> None:
    """Null runs: the change and the slope are zero, and 95 % of the intervals hold it."""
    generator = np.random.default_rng(8)
    covered = {"change": 0, "slope": 0}
    runs = 100
    for run in range(runs):
        common = scipy.signal.lfilter([1], [1, -0.7], generator.normal(size=length))
        a, b = (common + generator.normal(size=length) * 0.5 for _ in range(2))
        low, high = changes(a, b, resamples=300, seed=run)["index"].ci95
        covered["change"] += low <= 0 <= high
        low, high = slope(generator.normal(size=length), resamples=300, seed=run).ci95
        covered["slope"] += low <= 0 <= high
    assert min(covered.values()) / runs >= 0.87


def test_a_burst_is_a_high_variance_point_and_white_noise_has_few() -> None:
    noise = np.random.default_rng(9).normal(size=4096)
    assert high_variance(noise).mean() < 0.01
    noise[1000:1100] *= 3
    flagged = high_variance(noise)
    assert flagged[1010:1090].all()
    assert not flagged[:950].any()
    assert not high_variance(np.ones(10)).any()


def test_slope_agrees_with_scipy() -> None:
    y = 3 + 0.002 * np.arange(2048) + np.random.default_rng(4).normal(size=2048)
    got = slope(y, resamples=500, seed=0)
    expected = scipy.stats.linregress(np.arange(2048) / 1000, y)
    assert got.per_thousand == pytest.approx(expected.slope, rel=1e-9)
    assert got.ci95[0] < 2.0 < got.ci95[1]


def test_a_planted_period_is_found_and_named() -> None:
    generator = np.random.default_rng(5)
    red = scipy.signal.lfilter([1], [1, -0.5], generator.normal(size=2048))
    wavelengths = rope_wavelengths(10_000.0 ** (-np.arange(32) / 32))
    period = float(wavelengths[3])
    found = spectrum(red + 0.7 * np.sin(2 * np.pi * np.arange(2048) / period), seed=0)
    periods = found.period[found.significant]
    assert any(abs(p / period - 1) < 0.02 for p in periods)
    assert nearest_wavelength(period * 1.01, wavelengths) == pytest.approx(period)
    assert nearest_wavelength(4.5, wavelengths) is None


def test_red_noise_raises_few_alarms() -> None:
    generator = np.random.default_rng(6)
    alarms = 0
    for run in range(60):
        red = scipy.signal.lfilter([1], [1, -0.8], generator.normal(size=1024))
        alarms += spectrum(red, seed=run, surrogates=100).significant.any()
    assert alarms / 60 <= 0.12


def test_benjamini_hochberg_agrees_with_scipy() -> None:
    p = np.random.default_rng(7).uniform(size=200) ** 3
    expected = scipy.stats.false_discovery_control(p) <= 0.05
    np.testing.assert_array_equal(benjamini_hochberg(p, 0.05), expected)
    assert not benjamini_hochberg(np.ones(5), 0.05).any()


def test_a_constant_series_has_no_peaks() -> None:
    assert not spectrum(np.ones(512), seed=0).significant.any()
