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
from so8tqc.metrics.columns import COLUMNS
from so8tqc.metrics.distributions import Workspace, distribution
from so8tqc.metrics.divergence import TokenTable, summarise, token_rows


def rows(z: np.ndarray, w: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    goal = torch.from_numpy(targets)
    table = token_rows(
        distribution(torch.from_numpy(z), goal), distribution(torch.from_numpy(w), goal)
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
    np.testing.assert_allclose(
        got["kl_reverse"], (q * (log_q - log_p)).sum(1), rtol=1e-9, atol=1e-14
    )
    middle = (p + q) / 2
    js = (scipy.special.rel_entr(p, middle) + scipy.special.rel_entr(q, middle)).sum(1) / 2
    np.testing.assert_allclose(got["js"], js, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(got["nll_candidate"], -log_q[at], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(got["entropy_reference"], scipy.stats.entropy(p, axis=1), atol=1e-11)
    np.testing.assert_allclose(got["delta_p"], q[at] - p[at], atol=1e-13)
    np.testing.assert_allclose(got["max_prob_candidate"], q.max(1), rtol=1e-12)
    np.testing.assert_array_equal(got["same_top"], z.argmax(1) == w.argmax(1))
    five = [set(np.argsort(side, axis=1)[row, -5:]) for row in range(7) for side in (z, w)]
    overlap = [len(a & b) / 5 for a, b in zip(five[::2], five[1::2], strict=True)]
    np.testing.assert_allclose(got["top5_overlap"], overlap)
    np.testing.assert_array_equal(got["correct_reference"], z.argmax(1) == targets)
    np.testing.assert_allclose(got["max_abs_logit"], np.abs(w - z).max(1), rtol=1e-12)
    np.testing.assert_allclose(got["sum_square_logit"], np.square(w - z).sum(1), rtol=1e-12)


def exact_divergences(z: np.ndarray, w: np.ndarray) -> tuple[float, float, float]:
    """KL, reverse KL and JS by their definitions, in 60 digits."""
    with mpmath.workdps(60):
        log_p, log_q = (
            [x - mpmath.log(mpmath.fsum(map(mpmath.exp, side))) for x in side]
            for side in ([mpmath.mpf(float(x)) for x in row] for row in (z, w))
        )
        log_m = [
            mpmath.log((mpmath.exp(a) + mpmath.exp(b)) / 2)
            for a, b in zip(log_p, log_q, strict=True)
        ]

        def kl(of: list[mpmath.mpf], to: list[mpmath.mpf]) -> mpmath.mpf:
            return mpmath.fsum(mpmath.exp(a) * (a - b) for a, b in zip(of, to, strict=True))

        values = kl(log_p, log_q), kl(log_q, log_p), (kl(log_p, log_m) + kl(log_q, log_m)) / 2
    assert min(values) >= 0
    return tuple(float(value) for value in values)  # type: ignore[return-value]


@pytest.mark.parametrize("noise", [1e-7, 1e-5, 1e-4, 1e-2, 0.4, 1.0, 3.0, 300.0])
@pytest.mark.parametrize("spread", [0.0, 3.0, 1e4])
@pytest.mark.parametrize("outlier", [0.0, 5.0, -5.0])
def test_divergences_keep_ten_digits_however_close_the_models_are(
    noise: float, spread: float, outlier: float
) -> None:
    generator = np.random.default_rng(1)
    z = generator.normal(size=(1, 40)) * spread
    w = z + generator.normal(size=(1, 40)) * noise
    # a token of no probability that differs much must not spoil the rest
    z[0, 0], w[0, 0] = z.max() - 40, z.max() - 40 + outlier
    got = rows(z, w, np.array([0]))
    for name, exact in zip(("kl", "kl_reverse", "js"), exact_divergences(z[0], w[0]), strict=True):
        # w − z itself is only known to one float64 rounding of w
        tolerance = max(1e-10 * exact, (np.spacing(max(spread, 40.0)) * 40) ** 2)
        tolerance = max(tolerance, 1e-13 if exact > 0.1 else 0.0)
        assert abs(got[name][0] - exact) <= tolerance, name
        assert got[name][0] >= -tolerance


@pytest.mark.parametrize("border", [0.5, 1.0])
def test_no_token_is_lost_or_taken_twice_where_one_formula_ends(border: float) -> None:
    """|ln(q/p)| of a token is moved, bit by bit, over the border between two formulas."""
    generator = np.random.default_rng(0)
    for _ in range(12):
        z = generator.normal(size=(1, 2)) * 2
        w = z.copy()
        low, high = z[0, 0], z[0, 0] + 20.0
        while np.nextafter(low, high) < high:  # the last w[0] below the border, and the next
            w[0, 0] = middle = (low + high) / 2
            log_p, log_q = (side[0, 0] - np.logaddexp(*side[0]) for side in (z, w))
            low, high = (low, middle) if abs(log_q - log_p) > border else (middle, high)
        for _ in range(40):
            low = np.nextafter(low, -np.inf)
        for _ in range(80):
            w[0, 0] = low = np.nextafter(low, np.inf)
            for name, exact in zip(
                ("kl", "kl_reverse", "js"), exact_divergences(z[0], w[0]), strict=True
            ):
                assert rows(z, w, np.array([0]))[name][0] == pytest.approx(exact, rel=1e-10), name


@pytest.mark.parametrize("offset", [0.0, -1e4, 1e6, 1e8])
@pytest.mark.parametrize("noise", [1e-5, 1e-2, 0.6, 3.0])
def test_the_size_of_the_logits_costs_no_digits(offset: float, noise: float) -> None:
    """As many as the logits themselves keep when they are stored."""
    generator = np.random.default_rng(2)
    z = offset + generator.normal(size=(1, 30)) * 3
    w = z + generator.normal(size=(1, 30)) * noise
    got = rows(z, w, np.array([0]))
    for name, exact in zip(("kl", "kl_reverse", "js"), exact_divergences(z[0], w[0]), strict=True):
        assert got[name][0] == pytest.approx(exact, rel=1e-10), name


def test_logits_of_any_size() -> None:
    got = rows(np.array([[1e300, -1e300, 0.0]]), np.array([[1e300, 1e300, 0.0]]), np.array([0]))
    assert got["kl"][0] == pytest.approx(np.log(2), rel=1e-12)
    assert got["js"][0] == pytest.approx(1.5 * np.log(2) - 0.75 * np.log(3), rel=1e-12)


@pytest.mark.parametrize("gap", [750.0, 1e5, 1e30])
def test_differences_beyond_the_exponential_are_no_nan(gap: float) -> None:
    """A token impossible in the reference: e^gap overflows, its probability underflows."""
    z, w = np.zeros((3, 8)), np.zeros((3, 8))
    z[:, 0] = -gap
    w[0, 0] = 0.0  # now as likely as the others
    w[1, 0] = -gap / 2 - 800  # still impossible
    w[2, 0] = gap  # now certain
    got = rows(z, w, np.array([1, 1, 1]))
    np.testing.assert_allclose(got["kl"][:2], [np.log(8 / 7), 0.0], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(got["kl"][2], gap, rtol=1e-2)
    np.testing.assert_allclose(got["js"][2], np.log(2), rtol=1e-12)
    assert all(np.isfinite(got[name]).all() for name in ("kl", "kl_reverse", "js"))


@pytest.mark.parametrize("width", [3, 5, 320, 1023, 1024, 1025, 4000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_leading_tokens_are_the_largest_in_order(width: int, dtype: type) -> None:
    generator = np.random.default_rng(width)
    drawn = generator.normal(size=(6, width))
    for z in (drawn, np.sort(drawn), np.sort(drawn)[:, ::-1], np.round(drawn), drawn * 0):
        z = z.astype(dtype)
        expected = np.argsort(-z, axis=1, kind="stable")[:, :5]
        got = distribution(torch.from_numpy(z.copy()), torch.zeros(6, dtype=torch.int64)).leaders
        np.testing.assert_array_equal(got[:, : min(5, width)], expected)
        assert (got[:, width:] == width).all()


def test_of_equal_logits_the_first_is_the_top() -> None:
    z = np.random.default_rng(0).normal(size=(1, 2000))
    z[0, [700, 30, 1999]] = 9.0
    leaders = distribution(torch.from_numpy(z), torch.tensor([0])).leaders
    assert leaders[0, :3].tolist() == [30, 700, 1999]


def test_scratch_memory_may_be_shared_by_blocks_of_any_height() -> None:
    generator = np.random.default_rng(0)
    memory = Workspace(), Workspace()
    for height, width in ((4, 30), (2, 30), (5, 30), (3, 31)):
        z, w = (torch.from_numpy(generator.normal(size=(height, width))) for _ in range(2))
        goal = torch.zeros(height, dtype=torch.int64)
        fresh = token_rows(distribution(z, goal), distribution(w, goal))
        sides = distribution(z, goal, memory[0]), distribution(w, goal, memory[1])
        torch.testing.assert_close(token_rows(*sides), fresh, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_are_what_they_are(dtype: torch.dtype) -> None:
    z, w = (torch.randn(3, 50, generator=torch.Generator().manual_seed(i)) for i in range(2))
    goal = torch.tensor([0, 1, 2])
    halves = [distribution(logits.to(dtype), goal) for logits in (z, w)]
    singles = [distribution(logits.to(dtype).float(), goal) for logits in (z, w)]
    torch.testing.assert_close(token_rows(*halves), token_rows(*singles), rtol=0, atol=0)


@pytest.mark.parametrize("token", [-1, 50])
def test_tokens_outside_the_vocabulary_are_no_memory_of_others(token: int) -> None:
    with pytest.raises(IndexError, match="50 of the vocabulary"):
        distribution(torch.zeros(2, 50), torch.tensor([0, token]))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_every_row_has_a_target(count: int) -> None:
    with pytest.raises(ValueError, match="targets for 2 rows"):
        distribution(torch.zeros(2, 50), torch.zeros(count, dtype=torch.int64))


def test_other_shapes_are_not_compared() -> None:
    goal = torch.tensor([0, 1])
    sides = [distribution(torch.zeros(2, width), goal) for width in (50, 51)]
    with pytest.raises(ValueError, match="differ"):
        token_rows(*sides)


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
    columns["delta_p"] = np.array([0.5, -0.1, 0.0, 0.2])
    columns["entropy_reference"] = np.array([1.0, 1.0, 1.0, 1.0])
    columns["entropy_candidate"] = np.array([1.0, 0.0, 1.0, 1.0])
    columns["top5_overlap"] = np.array([1.0, 0.8, 0.6, 1.0])
    columns["kl_reverse"] = np.array([1.0, 2.0, 3.0, 4.0])
    columns["js"] = np.array([0.2, 0.4, 0.6, 0.8])
    columns["sum_square_logit"] = np.array([10.0, 0.0, 0.0, 30.0])
    table = TokenTable(columns, np.array([0, 0, 1, 1]), np.arange(4), 10, ("a", "b"))  # type: ignore[arg-type]
    summary = summarise(table)
    assert summary["kl_mean"] == 1.5
    assert summary["top1"] == 0.75
    assert summary["ln_ppl_ratio"] == 0.5
    assert summary["rms"] == 1.0
    assert summary["nll_correlation"] == pytest.approx(1.0)
    assert summary["dp_rms"] == pytest.approx(np.sqrt(0.075))
    assert summary["dp_percentiles"]["75"] == pytest.approx(0.275)
    assert (summary["dp_min"], summary["dp_max"], summary["kl_min"]) == (-0.1, 0.5, 0.0)
    assert summary["entropy_difference"] == pytest.approx(-0.25)
    assert summary["top5_overlap"] == pytest.approx(0.85)
    assert summary["kl_reverse_mean"] == pytest.approx(2.5)
    assert summary["js_mean"] == pytest.approx(0.5)
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
