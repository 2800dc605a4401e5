"""Which rotation was really applied to a weight: orthogonal Procrustes, block by block.

From M and M' (see ``fold.orient``) the rotation applied to block k is
B̂_k = argmin ‖M_k·B − M'_k‖_F over orthogonal B. With the SVD M_kᵀ·M'_k = U·S·Vᵀ it is
B̂_k = U·Vᵀ (Schönemann, Psychometrika 31, 1966). Storage rounding moves B̂ by about
ε·‖M_k‖_F/σ_min(M_k); what B̂ cannot explain, ‖M_k·B̂ − M'_k‖/‖M_k‖, is an edit that is no rotation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from so8tqc.rotations.rotation_set import FloatArray

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Recovered:
    """Rotations recovered from one target.

    Attributes:
        blocks: [N, b, b] orthogonal matrices B̂ with M' ≈ M·B̂.
        residual: [N] relative residual ‖M_k·B̂_k − M'_k‖_F / ‖M_k‖_F.
    """

    blocks: FloatArray
    residual: FloatArray


def recover_rotations(matrix: torch.Tensor, stored: torch.Tensor, size: int) -> Recovered:
    """Solve the Procrustes problem of every block.

    Args:
        matrix: [rows, N·size], the base weight, oriented.
        stored: [rows, N·size], the candidate's, oriented alike; finite.
        size: block size b.
    """
    import torch

    rows, columns = matrix.shape
    shape = (rows, columns // size, size)
    m = matrix.to(torch.float64).reshape(shape).transpose(0, 1)
    w = stored.to(torch.float64).reshape(shape).transpose(0, 1)
    u, _, vh = torch.linalg.svd(m.transpose(1, 2) @ w)
    blocks = u @ vh
    residual = (m @ blocks - w).flatten(1).norm(dim=1) / m.flatten(1).norm(dim=1)
    return Recovered(blocks.numpy(), residual.numpy())


def distances(recovered: FloatArray, expected: FloatArray) -> FloatArray:
    """‖B̂_k − B_k‖_F of each block: two [N, b, b] → [N]."""
    difference: FloatArray = np.linalg.norm(recovered - expected, axis=(1, 2))
    return difference
