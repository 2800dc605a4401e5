"""One stored weight, folded wrongly by hand in float64: the mistake is found in its numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from so8tqc.checkpoints.patch import tensor_view
from so8tqc.checkpoints.plan import PlannedTensor, plan_bake
from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.rotations.read import read_rotations
from so8tqc.rotations.rotation_set import RotationSet, Target
from so8tqc.services.weights.examine import Finding, examine, explanations, make_case

LAYER = 1


class Bench:
    """The weight of one layer, its rotation as a matrix, and what is found of a wrong fold."""

    def __init__(self, base: Path, gates: Path) -> None:
        self.rotations: RotationSet = read_rotations(gates)
        self.planned = plan_bake(
            open_checkpoint(base), self.rotations, dtype="keep", all_layers=True
        )
        self.plan: PlannedTensor = self.planned[LAYER]
        self.w = tensor_view(self.plan.entry).double()
        self.r = self.dense(LAYER)

    def dense(self, layer: int) -> torch.Tensor:
        blocks = torch.from_numpy(self.rotations.column_blocks(Target(layer)))
        return torch.block_diag(*blocks)

    def found(self, stored: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> Finding:
        tensor = stored.to(dtype)
        case = make_case(self.plan, tensor, self.planned, self.rotations)
        return examine(case, tensor, self.plan, self.rotations)


@pytest.fixture
def bench(llama: Path, make_gates: Callable[..., Path]) -> Bench:
    return Bench(llama, make_gates(llama))


def swapped(r: torch.Tensor) -> torch.Tensor:
    """The rotation with its first two blocks exchanged."""
    other = r.clone()
    other[:8, :8], other[8:16, 8:16] = r[8:16, 8:16], r[:8, :8]
    return other


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("fold", "code", "note"),
    [
        (lambda b: b.w, "not_baked", "the weight is the base's"),
        (lambda b: b.w @ b.r.T, "transposed", "Rᵀ was folded"),
        (lambda b: b.w @ b.r @ b.r, "double_baked", "R was folded twice"),
        (lambda b: b.w @ b.dense(2), "layers_permuted", "the rotation of layer 2"),
        (lambda b: b.w @ swapped(b.r), "blocks_permuted", "block(s) 0, 1 of 8"),
        (lambda b: b.r @ b.w, "wrong_site", "at the output side"),
        (lambda b: b.w @ (b.r * 1.2), "non_orthogonal", "are no rotations"),
    ],
)
def test_a_mistake_is_named(
    fold: Callable[[Bench], torch.Tensor], code: str, note: str, dtype: torch.dtype, bench: Bench
) -> None:
    found = bench.found(fold(bench), dtype)
    assert (found.layer, found.code) == (LAYER, code)
    assert note in found.note


def test_a_fold_in_16_bits_is_a_right_one_with_more_rounding(bench: Bench) -> None:
    product = (bench.w.bfloat16() @ bench.r.bfloat16()).float()
    found = bench.found(product, torch.float32)
    assert found.code == "storage_rounding"
    assert "bfloat16" in found.note


def test_rows_and_blocks_that_were_edited_are_counted(bench: Bench) -> None:
    right = bench.w @ bench.r
    rows = right.clone()
    rows[[3, 9]] *= 1.5
    found = bench.found(rows, torch.float32)
    assert (found.code, found.note) == ("foreign_edit", "row(s) 3, 9 of 64 were changed")
    block = right.clone()
    block[:, 16:24] += 0.3 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    found = bench.found(block, torch.float32)
    assert found.code == "foreign_edit"
    assert "block(s) 2 of 8" in found.note


def test_one_block_left_unrotated_is_named(bench: Bench) -> None:
    half = bench.r.clone()
    half[8:16, 8:16] = torch.eye(8)
    found = bench.found(bench.w @ half, torch.float32)
    assert found.code == "foreign_edit"
    assert found.note == "block(s) 1 were left unrotated"


def test_noise_is_explained_by_nothing(bench: Bench) -> None:
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    assert bench.found(noise, torch.float32).code == "foreign_edit"


def test_the_right_fold_is_the_first_explanation(bench: Bench) -> None:
    stored = (bench.w @ bench.r).bfloat16()
    case = make_case(bench.plan, stored, bench.planned, bench.rotations)
    nearest = explanations(case, bench.rotations)
    assert nearest[0].is_right
    assert nearest[0].matrix is case.matrix
    np.testing.assert_array_equal(nearest[0].blocks, case.blocks)
