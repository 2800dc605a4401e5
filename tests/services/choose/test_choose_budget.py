"""A budget is kept at its very edge, missed beyond it, by the value or by the whole interval."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from so8tqc.config import ChoiceOptions
from so8tqc.records import Verdict
from so8tqc.services.choose.budget import Budget, budget_of, verdicts
from so8tqc.services.choose.rows import Row


def row(size: int = 100, kl: float = 0.1, top1: float = 0.9, **fields: object) -> Row:
    found: Row = {
        "bytes": size,
        "kl_mean": kl,
        "kl_ci95": (kl / 2, 2 * kl),
        "kl_99": kl,
        "kl_99_ci95": None,
        "top1": top1,
        "top1_ci95": (top1 - 0.1, top1 + 0.05),
        "ppl_ratio": 1.0,
        "ppl_ratio_ci95": None,
    }
    return {**found, **fields}  # type: ignore[typeddict-item]


def test_the_edge_is_kept_and_the_next_number_is_not() -> None:
    budget = Budget(0.1, 0.9, 100, by_interval=False)
    assert budget.missed(row()) == []
    assert budget.missed(row(kl=np.nextafter(0.1, 1))) == ["KL 0.1 > 0.1"]
    assert budget.missed(row(top1=np.nextafter(0.9, 0))) == ["same top 90.00 % < 90.00 %"]
    assert budget.missed(row(size=101)) == ["101 bytes > 100 bytes"]
    assert budget.missed_quality(row(size=101)) == []


def test_by_the_interval_its_worse_end_is_judged() -> None:
    budget = Budget(0.1, 0.8, None, by_interval=True)
    assert budget.missed(row(kl=0.05)) == []  # 0.025 … 0.1
    assert len(budget.missed(row(kl=0.06))) == 1
    assert len(budget.missed(row(kl=0.05, top1=0.89))) == 1  # 0.79 …
    alone = row(kl=0.06, kl_ci95=None, top1=0.85, top1_ci95=None)  # too few texts for intervals
    assert budget.missed(alone) == []


def test_what_is_not_asked_is_not_missed_but_for_the_gate() -> None:
    nothing = Budget(None, None, None, by_interval=False)
    assert nothing.missed(row(size=10**12, kl=9.0, top1=0.0)) == []
    assert not nothing.asks_quality
    assert nothing.missed(row(survives=False)) == ["the gate does not survive"]
    assert nothing.missed(row(survives=True)) == []


def test_nan_keeps_no_budget() -> None:
    budget = Budget(1.0, 0.0, None, by_interval=False)
    assert len(budget.missed(row(kl=float("nan"), top1=float("nan")))) == 2


@given(
    kl=st.floats(0, 1),
    top1=st.floats(0, 1),
    size=st.integers(1, 10**6),
    asked=st.tuples(
        st.none() | st.floats(1e-6, 1),
        st.none() | st.floats(1e-6, 1),
        st.none() | st.integers(1, 10**6),
    ),
    by=st.sampled_from(["value", "interval"]),
)
def test_the_verdict_is_pass_exactly_where_nothing_is_missed(
    kl: float, top1: float, size: int, asked: tuple[float | None, float | None, int | None], by: str
) -> None:
    options = ChoiceOptions.model_validate(
        {"max_kl": asked[0], "min_top1": asked[1], "max_size": asked[2], "judge_by": by}
    )
    budget = budget_of(options)
    one = row(size, kl, top1)
    checks = verdicts(one, "FILE", budget, options)
    assert len(checks) == sum(limit is not None for limit in asked)
    failed = [check.id for check in checks if check.verdict is Verdict.FAIL]
    assert bool(failed) == bool(budget.missed(one))
    assert {check.subject for check in checks} <= {"FILE"}


def test_a_gate_that_does_not_survive_fails() -> None:
    options = ChoiceOptions()
    for survival, verdict in ((-1e-9, Verdict.PASS), (0.0, Verdict.FAIL), (0.1, Verdict.FAIL)):
        (check,) = verdicts(row(survival=survival), "F", budget_of(options), options)
        assert (check.id, check.verdict) == ("effect.survival", verdict)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (Budget(0.05, None, None, by_interval=False), "mean KL ≤ 0.05"),
        (Budget(0.05, 0.9, 120_000_000, by_interval=False),
         "mean KL ≤ 0.05, same top ≥ 90.00 %, size ≤ 120.0 MB"),
        (Budget(None, 0.5, None, by_interval=True),
         "same top ≥ 50.00 %, by the whole 95 % interval"),
    ],
)  # fmt: skip
def test_it_is_said_in_words(budget: Budget, said: str) -> None:
    assert str(budget) == said
