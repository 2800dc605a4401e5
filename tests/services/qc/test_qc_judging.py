"""Checks of token tables by limits: the values are numpy's, the limits those that were written."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from so8tqc.metrics.columns import COLUMNS
from so8tqc.metrics.divergence import TokenTable
from so8tqc.records import Verdict
from so8tqc.services.qc.judging import (
    EFFECT_FACTOR,
    SMALLEST_EFFECT,
    Bootstrap,
    calibration_summary,
    confidence_buckets,
    effect_check,
    fidelity_checks,
    kl_histogram,
    survival_check,
)
from so8tqc.services.qc.profiles import Limit

BOOTSTRAP = Bootstrap(200, 0)


def table(seed: int = 0, scale: float = 1.0, texts: int = 6, tokens: int = 25) -> TokenTable:
    make = np.random.default_rng(seed)
    n = texts * tokens
    columns = {name: scale * make.exponential(size=n) for name in COLUMNS}
    for name in ("same_top", "correct_reference", "correct_candidate"):
        columns[name] = (make.uniform(size=n) < 0.9).astype(np.float64)
    for name in ("max_prob_reference", "max_prob_candidate"):
        columns[name] = make.uniform(0.1, 1, size=n)
    return TokenTable(
        columns,
        np.repeat(np.arange(texts, dtype=np.int32), tokens),
        np.tile(np.arange(tokens, dtype=np.int32), texts),
        50,
        tuple(f"t{i}" for i in range(texts)),
    )


def test_values_are_those_of_the_columns() -> None:
    one = table()
    c, n = one.columns, 50 * 150
    wanted = {
        "logits.max_abs": c["max_abs_logit"].max(),
        "logits.mean_abs": c["sum_abs_logit"].sum() / n,
        "logits.rms": np.sqrt(c["sum_square_logit"].sum() / n),
        "kl.mean": c["kl"].mean(),
        "kl.max": c["kl"].max(),
        "kl.top1": c["same_top"].mean(),
    }
    limits = {name: Limit(limit=1e3) for name in wanted}
    checks = fidelity_checks(one, limits, "X", BOOTSTRAP, None)
    assert {check.id: check.value for check in checks} == pytest.approx(wanted, rel=1e-12)
    assert {check.subject for check in checks} == {"X"}
    for check in checks:
        assert check.comparison == (">=" if check.id == "kl.top1" else "<=")


@pytest.mark.parametrize(("target", "floor_scale"), [(1e-9, 1.0), (10.0, 1.0), (0.3, 0.01)])
def test_a_target_is_widened_to_twice_the_floor_and_no_further(
    target: float, floor_scale: float
) -> None:
    floor = table(1, floor_scale)
    limit = {"kl.mean": Limit(target=target, floor_factor=2.0)}
    (check,) = fidelity_checks(table(), limit, "X", BOOTSTRAP, floor)
    noise = floor.columns["kl"].mean()
    assert check.limit == pytest.approx(max(target, 2 * noise))
    assert check.noise_floor == pytest.approx(noise)
    assert check.target == target
    assert check.target_met is (check.value is not None and check.value <= target)
    strict = {"kl.mean": Limit(target=target, floor_factor=0.0)}
    (check,) = fidelity_checks(table(), strict, "X", BOOTSTRAP, floor)
    assert check.limit == target
    (check,) = fidelity_checks(table(), limit, "X", BOOTSTRAP, None)
    assert check.limit == target


def test_top_tokens_may_differ_by_twice_the_floors_and_one() -> None:
    floor, one = table(1), table()
    limit = {"kl.top1": Limit(target=0.999, floor_factor=2.0)}
    (check,) = fidelity_checks(one, limit, "X", BOOTSTRAP, floor)
    lacking = 1 - floor.columns["same_top"].mean()
    assert check.limit == pytest.approx(min(0.999, 1 - 2 * lacking - 1 / len(one)))


def test_calibration_is_the_change_from_the_reference() -> None:
    one = table()
    c = one.columns
    limits = {name: Limit(limit=1.0) for name in ("calibration.nll", "calibration.brier")}
    found = {check.id: check for check in fidelity_checks(one, limits, "X", BOOTSTRAP, None)}
    for name in ("nll", "brier"):
        change = c[f"{name}_candidate"].mean() - c[f"{name}_reference"].mean()
        assert found[f"calibration.{name}"].value == pytest.approx(change)


def test_the_expected_calibration_error_is_that_of_fifteen_bins() -> None:
    one = table()
    summary = calibration_summary(one)
    for side in ("reference", "candidate"):
        confidence = one.columns[f"max_prob_{side}"]
        correct = one.columns[f"correct_{side}"]
        bins = np.minimum((confidence * 15).astype(int), 14)
        error = sum(
            abs(confidence[bins == b].sum() - correct[bins == b].sum()) for b in range(15)
        ) / len(one)
        assert summary[f"ece_{side}"] == pytest.approx(error, rel=1e-9)
        assert summary[f"brier_{side}"] == pytest.approx(one.columns[f"brier_{side}"].mean())


def test_an_effect_must_stand_clear_of_the_floor() -> None:
    base, floor = table(0), table(1, 0.05)
    noise = floor.columns["kl"].mean()
    check = effect_check(base, floor, BOOTSTRAP)
    assert check.limit == pytest.approx(EFFECT_FACTOR * noise)
    assert check.verdict is Verdict.PASS
    assert effect_check(floor, floor, BOOTSTRAP).verdict is Verdict.FAIL
    tiny = effect_check(table(0, 1e-7), None, BOOTSTRAP)
    assert (tiny.limit, tiny.verdict) == (SMALLEST_EFFECT, Verdict.FAIL)


def test_a_gate_survives_with_its_whole_interval_or_not() -> None:
    near, far = table(0, 0.1), table(0, 1.0)
    check = survival_check(near, far, "X", BOOTSTRAP)
    assert check.ci95 is not None
    assert check.value == check.ci95[1] < 0
    assert check.verdict is Verdict.PASS
    assert survival_check(far, near, "X", BOOTSTRAP).verdict is Verdict.FAIL
    assert survival_check(near, table(9, 0.1), "X", BOOTSTRAP).verdict is Verdict.FAIL  # by chance
    few = survival_check(table(0, 0.1, texts=2), table(0, 1.0, texts=2), "X", BOOTSTRAP)
    assert few.ci95 is None
    assert few.verdict is Verdict.PASS


def test_every_token_is_in_the_histogram() -> None:
    one = table()
    one.columns["kl"][:3] = (0.0, 1e-30, 1e9)  # type: ignore[index]
    found = kl_histogram(one)
    assert sum(found["counts"]) == len(one)
    assert len(found["counts"]) == len(found["log10_centres"]) == 64
    assert found["counts"][0] >= 2
    assert found["counts"][-1] >= 1


def test_kl_where_the_reference_is_sure_and_where_it_is_not() -> None:
    generator = np.random.default_rng(3)
    sure = np.concatenate([[0.0, 0.5, 0.9, 1.0], generator.uniform(size=196)])
    kl, same = generator.exponential(size=200), (generator.uniform(size=200) < 0.8).astype(float)
    table = TokenTable(
        {"max_prob_reference": sure, "kl": kl, "same_top": same},
        np.repeat(np.arange(10, dtype=np.int32), 20),
        np.tile(np.arange(20, dtype=np.int32), 10),
        99,
        tuple("abcdefghij"),
    )
    buckets = confidence_buckets(table, BOOTSTRAP)
    inside = [sure < 0.5, (sure >= 0.5) & (sure < 0.9), sure >= 0.9]
    assert sum(bucket.tokens for bucket in buckets) == 200
    for bucket, mask in zip(buckets, inside, strict=True):
        assert bucket.tokens == mask.sum()
        assert bucket.share == mask.mean()
        assert bucket.kl_mean == pytest.approx(kl[mask].mean())
        assert bucket.top1 == pytest.approx(same[mask].mean())
        assert bucket.kl_ci95[0] < bucket.kl_mean < bucket.kl_ci95[1]
    never = replace(table, columns={**table.columns, "max_prob_reference": np.full(200, 0.1)})
    empty = confidence_buckets(never, BOOTSTRAP)[2]
    assert (empty.tokens, empty.kl_mean, empty.kl_ci95, empty.top1) == (0, None, None, None)
