"""Divergences against scipy in float64 and against high-precision arithmetic."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from so8tqc.metrics.bootstrap import paired_bootstrap, ratio_of_sums, resample_weights
from so8tqc.metrics.distributions import distribution
from so8tqc.metrics.divergence import COLUMNS, TokenTable, summarise, token_rows


def rows(z: np.ndarray, w: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    goal = torch.from_numpy(targets)
    table = token_rows(
        distribution(torch.from_numpy(z), goal), distribution(torch.from_numpy(w), goal), goal
    )
    return {name: table[:, i].numpy() for i, name in enumerate(COLUMNS)}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    noise=st.sampled_from([1e-3, 1.0, 10.0]),
)
def test_columns_agree_with_scipy(seed: int, scale: float, noise: float) -> None:
    generator = np.random.default_rng(seed)
    z = generator.normal(size=(7, 50)) * scale
    w = z + generator.normal(size=(7, 50)) * noise
    targets = generator.integers(0, 50, 7)
    got = rows(z, w, targets)
    p, q = scipy.special.softmax(z, axis=1), scipy.special.softmax(w, axis=1)
    log_p, log_q = scipy.special.log_softmax(z, axis=1), scipy.special.log_softmax(w, axis=1)
    at = (np.arange(7), targets)
    np.testing.assert_allclose(got["kl"], (p * (log_p - log_q)).sum(1), rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(got["nll_candidate"], -log_q[at], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(got["entropy_reference"], scipy.stats.entropy(p, axis=1), atol=1e-11)
    np.testing.assert_allclose(got["delta_p"], q[at] - p[at], atol=1e-13)
    np.testing.assert_allclose(got["max_prob_candidate"], q.max(1), rtol=1e-12)
    np.testing.assert_array_equal(got["same_top"], z.argmax(1) == w.argmax(1))
    np.testing.assert_array_equal(got["correct_reference"], z.argmax(1) == targets)
    np.testing.assert_allclose(got["max_abs_logit"], np.abs(w - z).max(1), rtol=1e-12)
    np.testing.assert_allclose(got["sum_square_logit"], np.square(w - z).sum(1), rtol=1e-12)


@pytest.mark.parametrize("noise", [1e-7, 1e-5, 1e-2, 3.0])
@pytest.mark.parametrize("spread", [0.0, 3.0, 1e4])
def test_kl_keeps_nine_digits_however_close_the_models_are(noise: float, spread: float) -> None:
    generator = np.random.default_rng(1)
    z = generator.normal(size=(1, 40)) * spread
    w = z + generator.normal(size=(1, 40)) * noise
    with mpmath.workdps(60):
        a, b = [mpmath.mpf(x) for x in z[0]], [mpmath.mpf(x) for x in w[0]]
        log_sum = [mpmath.log(mpmath.fsum(mpmath.exp(x) for x in side)) for side in (a, b)]
        exact = mpmath.fsum(
            mpmath.exp(x - log_sum[0]) * (x - log_sum[0] - y + log_sum[1])
            for x, y in zip(a, b, strict=True)
        )
        assert exact >= 0
        got = rows(z, w, np.array([0]))["kl"][0]
        assert got >= 0
        # w − z itself is only known to one float64 rounding of w
        tolerance = max(1e-9 * float(exact), (np.spacing(spread) * 40) ** 2)
        assert abs(got - float(exact)) <= tolerance


def test_shifting_all_logits_changes_nothing_but_the_logits() -> None:
    z = np.random.default_rng(0).normal(size=(3, 20))
    got = rows(z, z + 7.0, np.array([0, 1, 2]))
    assert got["kl"].max() < 1e-28
    np.testing.assert_allclose(got["max_abs_logit"], 7.0)


def test_summary_of_a_table_with_known_values() -> None:
    columns = {name: np.zeros(4) for name in COLUMNS}
    columns["kl"] = np.array([0.0, 1.0, 2.0, 3.0])
    columns["nll_reference"] = np.array([1.0, 1.0, 2.0, 2.0])
    columns["nll_candidate"] = np.array([1.5, 1.5, 2.5, 2.5])
    columns["same_top"] = np.array([1.0, 1.0, 1.0, 0.0])
    columns["sum_square_logit"] = np.array([10.0, 0.0, 0.0, 30.0])
    table = TokenTable(columns, np.array([0, 0, 1, 1]), np.arange(4), 10, ("a", "b"))  # type: ignore[arg-type]
    summary = summarise(table)
    assert summary["kl_mean"] == 1.5
    assert summary["top1"] == 0.75
    assert summary["ln_ppl_ratio"] == 0.5
    assert summary["rms"] == 1.0
    assert summary["nll_correlation"] == pytest.approx(1.0)
    np.testing.assert_array_equal(table.per_text("kl"), [[1.0, 2.0], [5.0, 2.0]])


@pytest.mark.parametrize("texts", [6, 12, 40])
def test_the_interval_of_a_mean_is_about_students(texts: int) -> None:
    values = np.random.default_rng(0).normal(5, 2, size=texts)
    ours = paired_bootstrap(
        np.stack([values, np.ones(texts)], axis=1), ratio_of_sums, resamples=8000, seed=1
    )
    theirs = scipy.stats.t.interval(
        0.95, texts - 1, loc=values.mean(), scale=scipy.stats.sem(values)
    )
    np.testing.assert_allclose(ours, theirs, atol=0.15 * (theirs[1] - theirs[0]))


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    hits = 0
    for run in range(200):
        values = generator.normal(size=30)
        low, high = paired_bootstrap(
            np.stack([values, np.ones(30)], axis=1), ratio_of_sums, resamples=400, seed=run
        )
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_resamples_draw_every_text_equally_often() -> None:
    weights = resample_weights(10, 5000, 0)
    np.testing.assert_array_equal(weights.sum(axis=1), 10)
    np.testing.assert_allclose(weights.mean(axis=0), 1.0, atol=0.06)


@pytest.mark.parametrize("texts", [1, 4])
def test_few_texts_have_no_interval(texts: int) -> None:
    low, high = paired_bootstrap(np.ones((texts, 2)), ratio_of_sums, resamples=100, seed=0)
    assert np.isnan(low)
    assert np.isnan(high)
