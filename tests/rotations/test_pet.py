"""The PET loss against numpy float64, and its schedules at and between their boundaries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from so8tqc.rotations.pet import (
    ThreePhaseSchedule,
    WarmupAnnealSchedule,
    pet_penalty,
    second_difference,
)


def test_penalty_agrees_with_numpy_and_with_theory() -> None:
    h = np.random.default_rng(0).normal(size=(2, 400, 16))
    d = h[:, 2:] - 2 * h[:, 1:-1] + h[:, :-2]
    got = float(pet_penalty(torch.from_numpy(h)))
    assert got == pytest.approx(np.square(d).mean() / np.square(h).mean(), rel=1e-12)
    assert got == pytest.approx(6.0, rel=0.1)  # white noise: 1 + 4 + 1
    line = torch.arange(10.0)[:, None].expand(10, 3)
    assert float(pet_penalty(line)) == 0.0
    assert second_difference(line).shape == (8, 3)


def test_huber_agrees_with_l2_when_differences_are_small_and_is_gentler_when_large() -> None:
    h = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    smooth = torch.cumsum(torch.cumsum(h, 0) * 1e-2, 0) + 100
    l2 = float(pet_penalty(smooth))
    assert float(pet_penalty(smooth, kind="huber")) == pytest.approx(l2, rel=1e-6)
    assert float(pet_penalty(h, kind="huber", delta=0.1)) < float(pet_penalty(h))


@given(st.floats(0, 1), st.floats(0, 2), st.floats(0, 2))
def test_three_phases(fraction: float, first: float, last: float) -> None:
    schedule = ThreePhaseSchedule(first, last)
    weight = schedule.weight(fraction)
    assert min(first, last) - 1e-12 <= weight <= max(first, last) + 1e-12
    assert schedule.weight(0.0) == schedule.weight(0.3) == first
    assert schedule.weight(0.7) == pytest.approx(last)
    assert schedule.weight(0.5) == pytest.approx((first + last) / 2)


def test_warm_up_and_annealing() -> None:
    schedule = WarmupAnnealSchedule(peak=2.0, final=0.5, boundaries=(0.1, 0.8))
    weights = [schedule.weight(f) for f in (0.0, 0.05, 0.1, 0.5, 0.8, 0.9, 1.0)]
    assert weights == pytest.approx([0.0, 1.0, 2.0, 2.0, 2.0, 1.25, 0.5])


@pytest.mark.parametrize("boundaries", [(0.7, 0.3), (-0.1, 0.5), (0.5, 1.1)])
def test_impossible_boundaries(boundaries: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="boundaries"):
        ThreePhaseSchedule(0.0, 1.0, boundaries)
    with pytest.raises(ValueError, match="boundaries"):
        WarmupAnnealSchedule(1.0, boundaries=boundaries)


@given(st.integers(0, 2**31), st.floats(1e-3, 1e3), st.sampled_from(["l2", "huber"]))
def test_the_penalty_is_free_of_scale(seed: int, scale: float, kind: str) -> None:
    h = torch.randn(12, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert float(pet_penalty(h * scale, kind=kind)) == pytest.approx(
        float(pet_penalty(h, kind=kind)), rel=1e-9
    )


def test_huber_agrees_with_numpy() -> None:
    h = np.random.default_rng(0).normal(size=(30, 8))
    d = np.abs(np.diff(h, n=2, axis=0)) / np.sqrt(np.square(h).mean())
    for delta in (0.5, 2.0):
        expected = np.where(d <= delta, d**2, 2 * delta * d - delta**2).mean()
        got = float(pet_penalty(torch.from_numpy(h), kind="huber", delta=delta))
        assert got == pytest.approx(expected, rel=1e-12)


def test_two_positions_have_no_second_difference() -> None:
    with pytest.raises(ValueError, match="at least 3 positions, got 2"):
        pet_penalty(torch.ones(2, 8))


def test_default_warm_up_ends_at_a_tenth_and_annealing_begins_at_four_fifths() -> None:
    schedule = WarmupAnnealSchedule(peak=1.0)
    weights = [schedule.weight(f) for f in (0.05, 0.1, 0.8, 0.9, 1.0)]
    assert weights == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize("boundaries", [(0.0, 0.5), (0.5, 1.0)])
def test_warm_up_and_annealing_take_time(boundaries: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="boundaries"):
        WarmupAnnealSchedule(1.0, boundaries=boundaries)


@pytest.mark.parametrize("kind", ["l2", "huber"])
def test_masked_positions_do_not_count(kind: str) -> None:
    """A sink at the front and padding at the end: the penalty is that of what is between."""
    generator = np.random.default_rng(1)
    h = generator.normal(size=(2, 20, 4))
    h[:, 0] = 1e4
    mask = np.ones((2, 20), dtype=bool)
    mask[:, 0], mask[1, 12:] = False, False
    h[1, 12:] = np.pi
    rows = [h[0, 1:], h[1, 1:12]]
    energy = np.square(np.concatenate(rows)).mean()
    d = np.abs(np.concatenate([np.diff(row, n=2, axis=0) for row in rows])) / np.sqrt(energy)
    expected = (d**2 if kind == "l2" else np.where(d <= 1, d**2, 2 * d - 1)).mean()
    got = pet_penalty(torch.from_numpy(h), kind=kind, mask=torch.from_numpy(mask))  # type: ignore[arg-type]
    assert float(got) == pytest.approx(expected, rel=1e-12)
    holes = torch.tensor([True, True, False] * 4)
    with pytest.raises(ValueError, match="no three positions"):
        pet_penalty(torch.ones(12, 2), mask=holes)


@pytest.mark.parametrize("kind", ["l2", "huber"])
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    h = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.autograd.gradcheck(
        lambda x: pet_penalty(x, kind=kind, delta=0.7),  # type: ignore[arg-type]
        h.requires_grad_(),
    )


def test_half_precision_is_computed_in_single() -> None:
    h = torch.randn(400, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    got = pet_penalty(h)
    assert got.dtype is torch.float32
    assert float(got) == pytest.approx(float(pet_penalty(h.double())), rel=1e-6)


@pytest.mark.parametrize(("kind", "delta"), [("l1", 1.0), ("huber", 0.0), ("huber", -1.0)])
def test_unknown_penalties(kind: str, delta: float) -> None:
    with pytest.raises(ValueError, match="no penalty"):
        pet_penalty(torch.ones(5, 2), kind=kind, delta=delta)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", [ThreePhaseSchedule(0.1, 1.0), WarmupAnnealSchedule(1.0)])
def test_schedules_end_where_training_does(
    schedule: ThreePhaseSchedule | WarmupAnnealSchedule,
) -> None:
    for fraction in (-0.01, 1.01, float("nan")):
        with pytest.raises(ValueError, match="fraction of training"):
            schedule.weight(fraction)
    with pytest.raises(ValueError, match="weights must be finite"):
        type(schedule)(-1.0, 1.0)
    with pytest.raises(ValueError, match="weights must be finite"):
        type(schedule)(1.0, float("inf"))
