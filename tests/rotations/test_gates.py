"""The trainable gate and the PET loss against numpy float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from so8tqc.errors import RotationError
from so8tqc.resources import data_file
from so8tqc.rotations.enums import Parametrization
from so8tqc.rotations.gates import RotationGate, attached_gates
from so8tqc.rotations.pet import (
    ThreePhaseSchedule,
    WarmupAnnealSchedule,
    pet_penalty,
    second_difference,
)
from so8tqc.rotations.read import read_rotations


@pytest.mark.parametrize("parametrization", [Parametrization.EXP, Parametrization.CAYLEY])
def test_a_gate_is_the_block_diagonal_product(parametrization: Parametrization) -> None:
    gate = RotationGate(24, parametrization=parametrization, std=0.3).double()
    theta = gate.theta.detach().numpy()
    a = theta - theta.transpose(0, 2, 1)
    if parametrization is Parametrization.EXP:
        blocks = [scipy.linalg.expm(x) for x in a]
    else:
        blocks = [np.linalg.solve(np.eye(8) - x / 2, np.eye(8) + x / 2) for x in a]
    x = np.random.default_rng(0).normal(size=(2, 5, 24))
    expected = x @ scipy.linalg.block_diag(*blocks).T  # rows are x: (R·x)ᵀ = xᵀ·Rᵀ
    np.testing.assert_allclose(gate(torch.from_numpy(x)).detach(), expected, atol=1e-12)


def test_only_theta_is_trained_and_everything_is_restored(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(llama), dtype=torch.float32)
    ids = torch.arange(10)[None] + 5
    before = model(ids).logits.detach()
    with attached_gates(model, std=0.3, seed=1) as gates:
        assert sorted(gates) == [0, 1, 2]
        changed = model(ids).logits
        changed.square().mean().backward()
        assert all(gate.theta.grad is not None for gate in gates.values())
        assert not any(p.requires_grad for p in model.parameters())
        assert (changed - before).abs().max() > 1e-2
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(ids).logits, before)


def test_gates_that_cannot_be() -> None:
    with pytest.raises(RotationError, match="no multiple of 8"):
        RotationGate(20)
    with pytest.raises(RotationError, match="legacy-taylor"):
        RotationGate(16, parametrization=Parametrization.LEGACY_TAYLOR)


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


@pytest.mark.parametrize("name", ["pet", "nopet"])
def test_the_shipped_gates_are_rotations_of_smollm2(name: str) -> None:
    rotations = read_rotations(data_file(f"gates/smollm2-135m-{name}.safetensors"))
    assert rotations.layers == tuple(range(30))
    assert {b.shape for b in rotations.blocks.values()} == {(72, 8, 8)}
    assert rotations.notices == ()
    assert (rotations.metadata["pet"] == "none") is (name == "nopet")
