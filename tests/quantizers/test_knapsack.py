"""The choice of types against all choices, tried one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from so8tqc.errors import InputError
from so8tqc.quantizers.knapsack import Option, cheapest, worth_having

_OPTION = st.builds(
    Option,
    st.sampled_from(["Q2_K", "Q4_0", "Q4_K", "Q6_K", "Q8_0"]),
    st.integers(1, 40).map(lambda n: 32 * n),
    st.floats(1e-7, 1e-1),
)
_TENSORS = st.dictionaries(
    st.sampled_from([f"blk.{i}.{kind}.weight" for i in range(3) for kind in ("a", "b")]),
    st.lists(_OPTION, min_size=1, max_size=4, unique_by=lambda o: o.type),
    min_size=1,
    max_size=5,
)


def best(tensors: Mapping[str, Sequence[Option]], limit: int) -> float | None:
    """The least cost of all combinations that fit."""
    sums = (
        (sum(o.bytes for o in some), sum(o.cost for o in some))
        for some in product(*tensors.values())
    )
    return min((cost for size, cost in sums if size <= limit), default=None)


@settings(max_examples=200, deadline=None)
@given(_TENSORS, st.integers(0, 5 * 40 * 32))
def test_it_is_the_best_of_all_that_fit(tensors: dict[str, list[Option]], limit: int) -> None:
    expected = best(tensors, limit)
    if expected is None:
        with pytest.raises(InputError):
            cheapest(tensors, limit)
        return
    chosen = cheapest(tensors, limit)
    assert list(chosen) == list(tensors)
    assert all(chosen[name] in tensors[name] for name in tensors)
    assert sum(option.bytes for option in chosen.values()) <= limit
    assert sum(option.cost for option in chosen.values()) == pytest.approx(expected, rel=1e-6)


def test_a_limit_that_is_met_exactly_and_missed_by_a_byte() -> None:
    small, large = Option("Q4_K", 1000, 0.5), Option("Q6_K", 1001, 0.1)
    tensors = {name: [small, large] for name in "abc"}
    for limit, count in ((3000, 0), (3001, 1), (3002, 2), (3003, 3)):
        chosen = cheapest(tensors, limit)
        # of tensors that are alike the first get the larger types
        assert [chosen[name] for name in "abc"] == [large] * count + [small] * (3 - count)
    with pytest.raises(InputError, match="2999 bytes are less than the 3000"):
        cheapest(tensors, 2999)


def test_sizes_of_a_large_model_do_not_overrun_by_a_block() -> None:
    tensors = {
        f"blk.{i:02}.w": [
            Option("a", 10**9 + 32 * i, 1.0),
            Option("b", 2 * 10**9 + 32, 0.1 + i / 99),
        ]
        for i in range(40)
    }
    limit = sum(some[0].bytes for some in tensors.values()) + 20 * 10**9 - 32 * 17
    assert sum(option.bytes for option in cheapest(tensors, limit).values()) <= limit


def test_what_another_beats_is_not_looked_at() -> None:
    options = [
        Option("Q5_0", 22, 0.3),
        Option("Q4_1", 20, 0.3),
        Option("IQ4_NL", 18, 0.5),
        Option("Q4_0", 18, 0.5),
        Option("Q8_0", 34, 0.0),
    ]
    assert [o.type for o in worth_having(options)] == ["IQ4_NL", "Q4_1", "Q8_0"]
