"""Whether a difference between two runs is more than chance, and what is said where none tells."""

from __future__ import annotations

from typing import Any

import pytest

from so8tqc.records import Check, Verdict, judge, skipped
from so8tqc.services.compare.values import (
    Named,
    Paired,
    changed_verdicts,
    compared_values,
    new_failures,
)

CI = tuple[float, float] | None


def named(check: Check, stage: str = "qc") -> dict[Named, Check]:
    return {Named(stage, check.id, check.subject, 0): check}


def check(value: float, ci95: CI = None, check_id: str = "kl.mean", limit: float = 1.0) -> Check:
    comparison = ">=" if check_id == "kl.top1" else "<="
    return judge(check_id, value, limit, detail="d", ci95=ci95, comparison=comparison, subject="F")


def outcome(a: Check, b: Check, paired: Paired | None = None) -> tuple[str, str]:
    (found,) = compared_values(named(a), named(b), paired or Paired("no tables"))
    assert found["difference"] == pytest.approx(b.value - a.value)  # type: ignore[operator]
    return found["outcome"], found["how"]


def pair(low: float, high: float) -> Paired:
    measure: Any = {"difference": (low + high) / 2, "ci95": (low, high), "p": 0.01}
    both: Any = {"kl": measure, "top1": measure, "nll": measure}
    return Paired(pairs={"F": both})


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        (check(0.1), check(0.1), "equal"),
        (check(0.1), check(0.2), "not comparable"),
        (check(0.1, (0.05, 0.15)), check(0.3, (0.2, 0.4)), "worse"),
        (check(0.3, (0.2, 0.4)), check(0.1, (0.05, 0.15)), "better"),
        (check(0.1, (0.05, 0.25)), check(0.3, (0.2, 0.4)), "undecided"),
        (check(0.8, (0.7, 0.85), "kl.top1"), check(0.95, (0.9, 0.99), "kl.top1"), "better"),
        (check(0.95, (0.9, 0.99), "kl.top1"), check(0.8, (0.7, 0.85), "kl.top1"), "worse"),
    ],
)
def test_intervals_that_do_not_meet_decide(a: Check, b: Check, wanted: str) -> None:
    assert outcome(a, b)[0] == wanted


def test_pairs_of_the_same_tokens_decide_before_intervals() -> None:
    a, b = check(0.10, (0.0, 0.2)), check(0.11, (0.0, 0.2))
    assert outcome(a, b, pair(0.005, 0.015))[0] == "worse"
    assert outcome(b, a, pair(-0.015, -0.005))[0] == "better"
    assert outcome(a, b, pair(-0.005, 0.02))[0] == "undecided"
    assert outcome(a, b, pair(0.0, 0.0)) == ("equal", "equal in every text")
    assert "no tables" in outcome(a, b)[1]


def test_only_means_of_qc_are_paired() -> None:
    a, b = check(0.1, check_id="kl.max"), check(0.2, check_id="kl.max")
    assert outcome(a, b, pair(0.1, 0.2)) == (
        "not comparable",
        "no interval to judge the difference by",
    )


def test_what_one_run_lacks_is_no_value_and_is_a_changed_verdict() -> None:
    a = named(check(0.1)) | named(skipped("kl.max", "no"))
    b = named(check(2.0)) | named(check(0.1, check_id="kl.top1"))
    assert [value["id"] for value in compared_values(a, b, Paired("x"))] == ["kl.mean"]
    changed = {row["id"]: (row["a"], row["b"]) for row in changed_verdicts(a, b)}
    assert changed == {
        "kl.mean": ("pass", "fail"),
        "kl.max": ("skip", None),
        "kl.top1": (None, "fail"),
    }


def test_a_failure_is_new_where_it_did_not_fail_before() -> None:
    good, bad = named(check(0.1)), named(check(2.0))
    assert new_failures(good, bad).verdict is Verdict.FAIL
    assert "kl.mean of F" in new_failures(good, bad).detail
    assert new_failures({}, bad).verdict is Verdict.FAIL
    assert new_failures(bad, bad).verdict is Verdict.PASS
    assert new_failures(bad, good).verdict is Verdict.PASS
    allowed = {name: c.model_copy(update={"allowed": True}) for name, c in bad.items()}
    assert new_failures(good, allowed).verdict is Verdict.PASS
    assert new_failures(allowed, bad).verdict is Verdict.FAIL
    told = changed_verdicts(allowed, bad)
    assert (told[0]["a"], told[0]["b"]) == ("fail, allowed", "fail")
