"""The one pass over bfloat16 weights gives the bytes of the general way, element by element."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from so8tqc.adapters import fused
from so8tqc.adapters.rounding import merged, rounded
from so8tqc.adapters.steps import AddLowRank, Step, Steps
from so8tqc.errors import ModelError, RotationError
from so8tqc.rotations.fold import round_once

BF16 = torch.bfloat16


class _Other:
    """The same step under another name, which the one pass does not take."""

    row_multiple = 1

    def __init__(self, step: AddLowRank) -> None:
        self.apply, self.exact = step.apply, step.exact


def generally(step: AddLowRank, weight: torch.Tensor) -> torch.Tensor:
    other: Step = _Other(step)
    return rounded(Steps((other,)), weight, slice(0, weight.shape[0]), BF16)


def at_once(step: AddLowRank, weight: torch.Tensor) -> torch.Tensor:
    made = merged(Steps((step,)), weight, slice(0, weight.shape[0]), BF16)
    assert made is not None
    return made


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def normal(*shape: int, seed: int, size: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


@given(
    seed=st.integers(0, 2**31),
    rank=st.integers(1, 19),
    columns=st.sampled_from([1, 3, 8, 511, 512, 513, 1030]),
    exponents=st.tuples(st.integers(-60, 10), st.integers(-40, 10), st.integers(-40, 10)),
    scale=st.sampled_from([2.0, 0.7, -1.0, 12 / 7]),
)
@settings(max_examples=60, deadline=None)
def test_bytes_are_those_of_the_general_way(
    seed: int, rank: int, columns: int, exponents: tuple[int, int, int], scale: float
) -> None:
    w, a, b = (2.0**e for e in exponents)
    weight = normal(5, columns, seed=seed, size=w).to(BF16)
    left, right = normal(5, rank, seed=seed + 1, size=b), normal(rank, columns, seed=seed + 2)
    step = AddLowRank(left, right * a, scale)
    assert same_bytes(at_once(step, weight), generally(step, weight))


@pytest.mark.parametrize("nudge", [0.0, 2.0**-30, -(2.0**-30), 2.0**-70, -(2.0**-70), 2.0**-130])
def test_ties_are_decided_exactly(nudge: float) -> None:
    """Values on and beside the middle of two bfloat16 numbers."""
    weight = torch.linspace(0.51, 0.99, 64).to(BF16)[None].repeat(2, 1)
    half_a_step = 2.0**-9
    a = torch.full((2, 64), half_a_step)
    a[1] = nudge
    b = torch.ones(2, 2)
    step = AddLowRank(b, a)
    got = at_once(step, weight)
    for i, j in np.ndindex(2, 64):
        exact = Fraction(float(weight[i, j])) + Fraction(half_a_step) + Fraction(float(a[1, j]))
        assert float(got[i, j]) == round_once(exact, BF16)
    assert len({float(x) for x in (got - weight).reshape(-1)}) == (2 if nudge == 0 else 1)


def test_few_elements_need_more_than_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights and adapters of usual sizes none needs exact arithmetic."""
    weight = normal(64, 4096, seed=0, size=0.02).to(BF16)
    step = AddLowRank(normal(64, 16, seed=1, size=0.002), normal(16, 4096, seed=2, size=1 / 64), 2)
    monkeypatch.setattr("so8tqc.adapters.rounding.exactly_rounded", None)
    assert at_once(step, weight).ne(weight).double().mean() > 0.5


def test_zeros_are_positive_and_the_smallest_numbers_exact() -> None:
    weight = torch.tensor([[0.0, -0.0, 2.0**-133, -(2.0**-133), 2.0**-126, -(2.0**-127)]]).to(BF16)
    for value in (0.0, 2.0**-70, -(2.0**-70), 2.0**-64):
        step = AddLowRank(torch.tensor([[value]]), torch.full((1, 6), 2.0**-64))
        assert same_bytes(at_once(step, weight), generally(step, weight))
    assert at_once(AddLowRank(torch.zeros(1, 1), torch.ones(1, 6)), weight)[0, 1].signbit() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named_as_before(bad: float) -> None:
    weight = normal(4, 40, seed=0).to(BF16)
    weight[2, 7] = bad
    step = AddLowRank(normal(4, 2, seed=1), normal(2, 40, seed=2))
    assert merged(Steps((step,)), weight, slice(0, 4), BF16) is None
    with pytest.raises(ModelError, match=r"\[2, 7\]"):
        rounded(Steps((step,)), weight, slice(0, 4), BF16)


def test_an_overflow_is_named_as_before() -> None:
    weight = torch.full((2, 8), 3.3e38).to(BF16)
    step = AddLowRank(torch.ones(2, 1), torch.full((1, 8), 3e37))
    with pytest.raises(RotationError, match="does not fit"):
        rounded(Steps((step,)), weight, slice(0, 2), BF16)


def test_what_it_does_not_take() -> None:
    weight = normal(4, 8, seed=0)
    step = AddLowRank(normal(4, 2, seed=1), normal(2, 8, seed=2))
    wide = AddLowRank(normal(4, 2, seed=1).double(), normal(2, 8, seed=2).double())
    rows = slice(0, 4)
    assert merged(Steps((step,)), weight, rows, BF16) is None
    assert merged(Steps((step,)), weight.to(BF16), rows, torch.float32) is None
    assert merged(Steps((step, step)), weight.to(BF16), rows, BF16) is None
    assert merged(Steps((wide,)), weight.to(BF16), rows, BF16) is None
    assert merged(Steps((step,)), normal(8, 4, seed=0).to(BF16).T, rows, BF16) is None


def test_too_many_ties_go_the_general_way() -> None:
    """Every element a tie: there is no room for all of them, and the bytes are the same."""
    weight = torch.full((600, 512), 0.75).to(BF16)
    step = AddLowRank(torch.ones(600, 1), torch.full((1, 512), 2.0**-9))
    assert merged(Steps((step,)), weight, slice(0, 600), BF16) is None
    small = slice(0, 2)
    assert same_bytes(rounded(Steps((step,)), weight, small, BF16), generally(step, weight[small]))
    assert fused.TILE == 512
