"""Which file is recommended: the smallest that keeps what is asked, or the nearest to it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from so8tqc.config import ChoiceOptions
from so8tqc.services.choose.budget import budget_of
from so8tqc.services.choose.recommend import DEFAULT_TOP1, recommend
from so8tqc.services.choose.rows import Row


def row(size: int, kl: float, top1: float) -> Row:
    return {
        "bytes": size,
        "kl_mean": kl,
        "kl_ci95": None,
        "kl_99": kl,
        "kl_99_ci95": None,
        "top1": top1,
        "top1_ci95": None,
        "ppl_ratio": 1.0,
        "ppl_ratio_ci95": None,
    }


def recommended(rows: dict[str, Row], **asked: object) -> tuple[str, str]:
    options = ChoiceOptions.model_validate(asked)
    return recommend(rows, budget_of(options), options, tried=len(rows))


LADDER = {
    "Q4": row(40, 0.20, 0.80),
    "Q5": row(50, 0.05, 0.91),
    "Q6": row(60, 0.02, 0.95),
    "Q8": row(80, 0.01, 0.99),
}


def test_without_a_budget_nine_top_tokens_of_ten_decide() -> None:
    name, reason = recommended(LADDER)
    assert name == "Q5"
    assert "the smallest of the 4 files tried" in reason
    assert "at least 90.00 % of places" in reason


def test_with_a_budget_the_smallest_that_keeps_it() -> None:
    assert recommended(LADDER, max_kl=0.02)[0] == "Q6"
    assert recommended(LADDER, min_top1=0.8)[0] == "Q4"
    assert recommended(LADDER, max_kl=0.2, min_top1=0.9, max_size=60)[0] == "Q5"


def test_a_size_alone_asks_for_the_best_of_that_size() -> None:
    name, reason = recommended(LADDER, max_size=60)
    assert name == "Q6"
    assert "the lowest KL of the 4 files tried within the budget" in reason


def test_where_none_keeps_it_the_nearest_says_what_it_misses() -> None:
    name, reason = recommended(LADDER, max_kl=0.001, min_top1=0.9)
    assert name == "Q8"  # misses one of two, with the lowest KL
    assert "None of the 4 files tried keeps the budget" in reason
    assert "It misses: KL 0.01 > 0.001." in reason


sizes = st.dictionaries(
    st.sampled_from("ABCDEF"),
    st.tuples(st.integers(1, 100), st.floats(1e-4, 1), st.floats(0, 1)),
    min_size=1,
)


@given(sizes, st.none() | st.floats(1e-4, 1))
def test_no_smaller_file_would_have_done(
    drawn: dict[str, tuple[int, float, float]], max_kl: float | None
) -> None:
    rows = {name: row(*values) for name, values in drawn.items()}

    def does(one: Row) -> bool:
        return one["top1"] >= DEFAULT_TOP1 if max_kl is None else one["kl_mean"] <= max_kl

    name, reason = recommended(rows, max_kl=max_kl)
    assert name in reason
    doing = [one["bytes"] for one in rows.values() if does(one)]
    if doing:
        assert does(rows[name])
        assert rows[name]["bytes"] == min(doing)
    else:
        assert rows[name]["kl_mean"] == min(one["kl_mean"] for one in rows.values())
