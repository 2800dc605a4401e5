"""One pass for all temperatures, against full logits at each."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp
from scipy.stats import norm, t

from so8tqc.metrics.calibration import adaptive_calibration_error, expected_calibration_error
from so8tqc.metrics.temperature.fit import Change, change, fit_temperature, percentile_interval
from so8tqc.metrics.temperature.measures import (
    BRIER,
    CONFIDENCE_VARIANCE,
    NLL,
    Measure,
    adaptive_ece,
    ece,
    entropy_mismatch,
)
from so8tqc.metrics.temperature.table import (
    TemperatureTable,
    knots,
    partition_rows,
    temperature_table,
)

BOUNDS = (0.5, 3.0)
LOG_BOUNDS = (float(np.log(0.5)), float(np.log(3.0)))


def _table(
    z: np.ndarray, y: np.ndarray, text: np.ndarray, bounds: tuple[float, float] = BOUNDS
) -> TemperatureTable:
    top, each = z.argmax(axis=1), np.arange(len(y))
    return temperature_table(
        partition_rows(z, knots(bounds))[0],
        z[each, y].astype(np.float64) - z[each, top],
        top == y,
        text,
        tuple(f"t{i}" for i in range(int(text.max()) + 1)),
        bounds,
    )


def _sampled(
    seed: int, temperature: float, texts: int = 12, tokens: int = 40, V: int = 60
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Float32 logits and next tokens drawn from softmax(z / temperature)."""
    generator = np.random.default_rng(seed)
    n = texts * tokens
    scale = generator.uniform(0.5, 3.5, size=(n, 1))  # some tokens certain, some not
    z = (generator.normal(size=(n, V)) * scale).astype(np.float32)
    y = (z / temperature + generator.gumbel(size=z.shape)).argmax(axis=1)
    return z, y, np.repeat(np.arange(texts), tokens)


def _full(z: np.ndarray, y: np.ndarray, temperature: float | np.ndarray) -> dict[str, np.ndarray]:
    logp = log_softmax(z.astype(np.float64) / temperature, axis=1)
    p = np.exp(logp)
    each = np.arange(len(y))
    return {
        "nll": -logp[each, y],
        "entropy": -(p * logp).sum(axis=1),
        "confidence": p.max(axis=1),
        "brier": ((p - np.eye(z.shape[1])[y]) ** 2).sum(axis=1),
    }


@pytest.mark.parametrize("temperature", [0.5, 0.53, 0.77, 1.0, 1.09, 1.5, 2.3, 3.0])
def test_scores_match_full_logits(temperature: float) -> None:
    z, y, text = _sampled(0, 1.3)
    scores = _table(z, y, text).at(temperature)
    for name, expected in _full(z, y, temperature).items():
        # entropy needs a derivative of the interpolant, one order less exact
        tolerance = 2e-3 if name == "entropy" else 2e-4
        value = getattr(scores, name)
        np.testing.assert_allclose(value, expected, atol=tolerance)
        assert value.mean() == pytest.approx(expected.mean(), abs=2e-5)


def test_temperature_one_is_exact() -> None:
    z, y, text = _sampled(1, 1.0)
    scores = _table(z, y, text).at(1.0)
    for name, expected in _full(z, y, 1.0).items():
        np.testing.assert_allclose(getattr(scores, name), expected, rtol=1e-9, atol=1e-12)


def test_a_temperature_for_each_token_is_that_temperature_for_all() -> None:
    z, y, text = _sampled(14, 1.3)
    table = _table(z, y, text)
    temperatures = np.random.default_rng(0).uniform(*BOUNDS, size=len(y))
    temperatures[:3] = 0.5, 1.0, 3.0
    scores, slope = table.at(temperatures), table.nll_slope(temperatures)
    for i in range(0, len(y), 37):
        one = table.at(float(temperatures[i]))
        for name in ("nll", "entropy", "confidence", "brier"):
            assert getattr(scores, name)[i] == pytest.approx(getattr(one, name)[i], abs=1e-9)
        assert slope[i] == pytest.approx(table.nll_slope(float(temperatures[i]))[i], abs=1e-9)
    for name, expected in _full(z, y, temperatures[:, None]).items():
        np.testing.assert_allclose(getattr(scores, name), expected, atol=2e-3)
    with pytest.raises(ValueError, match="not within"):
        table.at(temperatures + 0.1)


def test_polynomials_are_those_of_scipy() -> None:
    z, y, text = _sampled(16, 1.3)
    table = _table(z, y, text)
    middle = np.random.default_rng(2).uniform(*np.sort(-np.log(BOUNDS)), size=8)
    for x in (*table.log_partition.x[[0, 5, 7, -1]], *middle):
        for nu in (0, 1):
            expected = table.log_partition(x, nu=nu)
            for place in (np.asarray(x), np.full(len(y), x)):
                found = table.log_partition_at(place, slope=bool(nu))
                np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


def test_slope_is_the_derivative_of_nll() -> None:
    z, y, text = _sampled(15, 1.3)
    temperatures = np.random.default_rng(1).uniform(0.6, 2.9, size=len(y))
    step = 1e-5
    above, below = (
        _full(z, y, (temperatures + sign * step)[:, None])["nll"] for sign in (1.0, -1.0)
    )
    np.testing.assert_allclose(
        _table(z, y, text).nll_slope(temperatures), (above - below) / (2 * step), atol=5e-3
    )


def test_worst_case_one_token_against_all_others() -> None:
    V = 262_144
    z = np.zeros((3, V), dtype=np.float32)
    z[:, 7] = [9.0, 12.5, 16.0]  # near ln V = 12.5 the distribution switches over
    table = _table(z, np.array([7, 7, 7]), np.zeros(3, dtype=np.intp))
    for temperature in np.geomspace(*BOUNDS, 41):
        exact = logsumexp(
            (z[:, [7, 0]] - z[:, [7]]).astype(np.float64) / temperature, b=[[1, V - 1]], axis=1
        )
        np.testing.assert_allclose(table.at(float(temperature)).nll, exact, atol=1e-3)


def test_tiles_do_not_show() -> None:
    generator = np.random.default_rng(2)
    z = generator.normal(size=(19, 9001))  # neither dimension a multiple of a tile
    betas = knots(BOUNDS)
    z[3, [40, 7000]] = z[3].max() + 1.0  # two that are equal: the first is the most likely
    rows, tops = partition_rows(z, betas)
    assert tops.tolist() == z.argmax(axis=1).tolist()
    assert tops[3] == 40
    u = z - z.max(axis=1, keepdims=True)
    for k, beta in enumerate(betas):
        np.testing.assert_allclose(rows[:, k, 0], logsumexp(beta * u, axis=1), rtol=1e-12)
        p = np.exp(beta * u - rows[:, k, :1])
        mean = (p * u).sum(axis=1)
        np.testing.assert_allclose(rows[:, k, 1], beta * mean, rtol=1e-11)
        variance = (p * u**2).sum(axis=1) - mean**2
        np.testing.assert_allclose(rows[:, k, 2], beta * mean + beta**2 * variance, atol=1e-9)


def test_knots_double_onto_knots_and_cover_the_bounds() -> None:
    betas = knots((0.7, 2.2))
    assert 1.0 in betas
    assert betas[0] <= 1 / 2.2
    assert betas[-1] >= 2 / 0.7
    doubled = 2 * betas[2 * betas <= betas[-1]]
    assert set(doubled.tolist()) <= set(betas.tolist())


def test_outside_the_bounds_is_refused() -> None:
    z, y, text = _sampled(3, 1.0, texts=1)
    with pytest.raises(ValueError, match="not within"):
        _table(z, y, text).at(3.01)


def test_select_renumbers() -> None:
    z, y, text = _sampled(4, 1.0, texts=5, tokens=6)
    part = _table(z, y, text).select(np.array([3, 1]))
    assert part.texts == ("t3", "t1")
    chosen = np.flatnonzero((text == 1) | (text == 3))
    np.testing.assert_allclose(part.at(1.0).nll, _full(z, y, 1.0)["nll"][chosen])
    assert part.per_text(part.at(1.0).nll)[0, 0] == pytest.approx(
        _full(z, y, 1.0)["nll"][text == 3].sum()
    )


@pytest.mark.parametrize("true", [0.7, 1.0, 1.6, 2.4])
@pytest.mark.parametrize(("measure", "column"), [(NLL, "nll"), (BRIER, "brier")])
def test_fit_is_the_optimum_of_full_logits(measure: Measure, column: str, true: float) -> None:
    z, y, text = _sampled(5, true, V=300)
    fit = fit_temperature(_table(z, y, text), measure, resamples=100, seed=0)
    exact = minimize_scalar(
        lambda x: _full(z, y, float(np.exp(x)))[column].mean(),
        bounds=LOG_BOUNDS,
        method="bounded",
        options={"xatol": 1e-8},
    )
    assert fit.temperature == pytest.approx(np.exp(exact.x), abs=1e-3)
    assert fit.converged
    assert not fit.at_bound
    assert fit.ci95 is not None
    assert fit.ci95[0] < fit.temperature < fit.ci95[1]


@pytest.mark.parametrize("bins", [5, 15])
def test_ece_at_any_temperature_is_that_of_full_logits(bins: int) -> None:
    z, y, text = _sampled(6, 1.5)
    table = _table(z, y, text)
    for temperature in (0.6, 1.0, 1.37, 2.9):
        confidence = _full(z, y, temperature)["confidence"]
        correct = z.argmax(axis=1) == y
        assert ece(bins).at(table, temperature) == pytest.approx(
            expected_calibration_error(confidence, correct, bins), abs=1e-3
        )
        assert adaptive_ece(bins).at(table, temperature) == pytest.approx(
            adaptive_calibration_error(confidence, correct, bins), abs=1e-3
        )


def test_ece_fit_is_no_worse_than_any_temperature_looked_at() -> None:
    z, y, text = _sampled(7, 1.7)
    table = _table(z, y, text)
    fit = fit_temperature(table, ece(15), resamples=100, seed=0)
    best = min(ece(15).at(table, float(t)) for t in np.geomspace(*BOUNDS, 500))
    assert fit.value <= best + 2e-3
    assert fit.temperature == pytest.approx(1.7, abs=0.3)


def test_entropy_is_matched() -> None:
    z, y, text = _sampled(8, 1.0)
    goal = _full(z, y, 1.25)["entropy"]
    fit = fit_temperature(_table(z, y, text), entropy_mismatch(goal), resamples=200, seed=0)
    assert fit.temperature == pytest.approx(1.25, abs=1e-3)
    assert fit.ci95 is not None
    assert fit.ci95[1] - fit.ci95[0] < 1e-2  # paired: the texts' own spread cancels


def test_confidence_variance_runs_to_the_bound() -> None:
    z, y, text = _sampled(9, 1.0)
    fit = fit_temperature(_table(z, y, text), CONFIDENCE_VARIANCE, resamples=100, seed=0)
    assert fit.at_bound
    assert fit.temperature == 3.0


def test_a_temperature_beyond_the_bounds_is_reported_at_the_bound() -> None:
    z, y, text = _sampled(10, 2.0)
    fit = fit_temperature(_table(z, y, text, (0.8, 1.2)), NLL, resamples=100, seed=0)
    assert fit.at_bound
    assert fit.temperature == 1.2
    assert fit.ci95 == (1.2, 1.2)


@pytest.mark.parametrize("texts", [1, 4])
def test_too_few_texts_have_no_interval(texts: int) -> None:
    z, y, text = _sampled(11, 1.0, texts=texts, tokens=200)
    table = _table(z, y, text)
    assert fit_temperature(table, NLL, resamples=100, seed=0).ci95 is None
    unsure = change(table, NLL, 1.1, resamples=100, seed=0)
    assert unsure.ci95 is None
    assert not unsure.better
    assert unsure.margin == 0.0


def test_interval_covers_the_known_temperature() -> None:
    intervals = []
    for seed in range(200):
        z, y, text = _sampled(100 + seed, 1.4, texts=16, tokens=25, V=20)
        intervals.append(
            fit_temperature(_table(z, y, text), NLL, resamples=300, seed=seed).ci95 or (0.0, 0.0)
        )
    covered = sum(low <= 1.4 <= high for low, high in intervals)
    assert 180 <= covered <= 198  # 90 % to 99 %
    assert np.median([high - low for low, high in intervals]) < 0.5


def test_interval_from_the_grid_agrees_with_refitting() -> None:
    """The bootstrap by matrix products gives what fitting each resample anew would."""
    z, y, text = _sampled(12, 1.5, texts=8, tokens=30)
    table = _table(z, y, text)
    fit = fit_temperature(table, NLL, resamples=200, seed=3)
    generator = np.random.default_rng(3)
    weights = generator.multinomial(8, np.full(8, 1 / 8), size=200)[:, text]
    refitted = []
    for w in weights:
        result = minimize_scalar(
            lambda x, w=w: (w * table.at(float(np.exp(x))).nll).sum(),
            bounds=LOG_BOUNDS,
            method="bounded",
        )
        refitted.append(np.exp(result.x))
    expected = percentile_interval(np.array(refitted), 8)
    assert fit.ci95 == pytest.approx(expected, abs=1e-3)


def test_expanded_percentiles() -> None:
    values = np.linspace(0, 1, 100_001)
    low, high = percentile_interval(values, 10)
    tail = norm.cdf(-t.ppf(0.975, 9) * (10 / 9) ** 0.5)
    assert (low, high) == pytest.approx((tail, 1 - tail), abs=1e-5)
    assert percentile_interval(values, 10_000) == pytest.approx((0.025, 0.975), abs=1e-4)


def test_change_is_paired_and_signed() -> None:
    z, y, text = _sampled(13, 1.8, texts=10, tokens=60)
    table = _table(z, y, text)
    better = change(table, NLL, 1.8, resamples=500, seed=0)
    assert better.before == pytest.approx(_full(z, y, 1.0)["nll"].mean())
    assert better.after == pytest.approx(_full(z, y, 1.8)["nll"].mean(), abs=1e-4)
    assert better.better
    worse = change(table, NLL, 0.6, resamples=500, seed=0)
    assert not worse.better
    assert worse.difference > worse.margin  # worse with its whole interval
    none = change(table, NLL, 1.0, resamples=500, seed=0)
    assert (none.difference, none.ci95, none.margin) == (0.0, (0.0, 0.0), 0.0)


@pytest.mark.parametrize(
    ("ci95", "beyond"), [((0.002, 0.05), True), ((-0.002, 0.011), False), ((0.0, 0.02), False)]
)
def test_margin_is_exceeded_exactly_when_the_interval_is_above_zero(
    ci95: tuple[float, float], beyond: bool
) -> None:
    worse = Change(before=0.0, after=0.01, ci95=ci95)
    assert (worse.difference > worse.margin) is beyond
    assert not worse.better
