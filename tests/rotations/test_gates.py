"""The trainable gate against numpy float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from so8tqc.errors import RotationError
from so8tqc.resources import data_file
from so8tqc.rotations.enums import Parametrization
from so8tqc.rotations.gates import RotationGate, attached_gates
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
    frozen = model.get_input_embeddings().weight.requires_grad_(False)  # stays so afterwards
    ids = torch.arange(10)[None] + 5
    before = model(ids).logits.detach()
    with attached_gates(model, std=0.3, seed=1) as gates:
        assert sorted(gates) == [0, 1, 2]
        changed = model(ids).logits
        changed.square().mean().backward()
        assert all(gate.theta.grad.abs().max() > 0 for gate in gates.values())
        assert not any(p.requires_grad for p in model.parameters())
        assert (changed - before).abs().max() > 1e-2
    assert all(p.requires_grad is (p is not frozen) for p in model.parameters())
    torch.testing.assert_close(model(ids).logits, before)


def test_the_seed_and_the_std_decide_the_initial_thetas(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(llama), dtype=torch.float32)

    def initial(seed: int, std: float) -> torch.Tensor:
        with attached_gates(model, std=std, seed=seed) as gates:
            return torch.stack([gate.theta.detach() for gate in gates.values()])

    assert torch.equal(initial(1, 1e-3), initial(1, 1e-3))
    assert not torch.equal(initial(1, 1e-3), initial(2, 1e-3))
    torch.testing.assert_close(initial(1, 2e-3), 2 * initial(1, 1e-3))
    assert float(initial(1, 1e-3).std()) == pytest.approx(1e-3, rel=0.1)


def test_gates_that_cannot_be() -> None:
    with pytest.raises(RotationError, match="no multiple of 8"):
        RotationGate(20)
    with pytest.raises(RotationError, match="legacy-taylor"):
        RotationGate(16, parametrization=Parametrization.LEGACY_TAYLOR)


@pytest.mark.parametrize("name", ["pet", "nopet"])
def test_the_shipped_gates_are_rotations_of_smollm2(name: str) -> None:
    rotations = read_rotations(data_file(f"gates/smollm2-135m-{name}.safetensors"))
    assert rotations.layers == tuple(range(30))
    assert {b.shape for b in rotations.blocks.values()} == {(72, 8, 8)}
    assert rotations.notices == ()
    assert (rotations.metadata["pet"] == "none") is (name == "nopet")
