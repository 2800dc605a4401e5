"""What a training in 16 bits computed instead of R, measured.

R is always what float64 makes of the stored theta. A gate that was trained in bfloat16 multiplied
by an R computed in bfloat16, which is no rotation to more than three digits: how far the two are
apart is said, beside what rounding a weight to that dtype costs by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from so8tqc.rotations.enums import Parametrization
from so8tqc.rotations.rotation_set import FloatArray, Target, orthogonality_error

if TYPE_CHECKING:
    import torch

_ROUNDOFF = {"bfloat16": 2.0**-9, "float16": 2.0**-12}
"""Largest relative error of rounding to nearest; a uniform one has 1/√3 of it in the mean."""


def coarse_notices(
    theta: Mapping[Target, FloatArray],
    blocks: Mapping[Target, FloatArray],
    parametrization: Parametrization,
    dtype: str,
) -> list[str]:
    """What to say of gates stored in 16 bits; [] of others.

    Args:
        theta: target → [N, b, b], as stored.
        blocks: target → R as float64 makes it.
        parametrization: how.
        dtype: torch's name of the dtype theta is stored in, or "".
    """
    if dtype not in _ROUNDOFF or parametrization is Parametrization.MATRIX:
        return []
    coarse = {t: rotation_in(value, parametrization, dtype) for t, value in theta.items()}
    distance = max(_relative(coarse[t], blocks[t]) for t in theta)
    drift = max(float(orthogonality_error(coarse[t]).max()) for t in theta)
    floor = _ROUNDOFF[dtype] / math.sqrt(3)
    beyond = "more than" if distance > floor else "no more than"
    return [
        f"The gates are stored in {dtype}. What is baked is the R that float64 makes of them; an R "
        f"computed in {dtype}, as a training in that dtype did, differs from it by {distance:.1e} "
        f"of its norm in the worst layer (‖RᵀR − I‖ {drift:.1e}): {beyond} what rounding a weight "
        f"to {dtype} costs, {floor:.1e}."
    ]


def rotation_in(theta: FloatArray, parametrization: Parametrization, dtype: str) -> FloatArray:
    """R computed in a 16-bit dtype, every operation rounded to it: [N, b, b] → [N, b, b].

    torch has neither a matrix exponential nor a solver in 16 bits; trainings compute these two in
    float32 and round the result, and so does this.
    """
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    x = torch.from_numpy(theta).to(kind)
    a = x - x.transpose(1, 2)
    one = torch.eye(a.shape[1], dtype=kind)
    match parametrization:
        case Parametrization.EXP:
            r = torch.linalg.matrix_exp(a.float()).to(kind)
        case Parametrization.CAYLEY:
            half, eye = a.float() / 2, one.float()
            r = torch.linalg.solve(eye - half, eye + half).to(kind)
        case Parametrization.LEGACY_TAYLOR:
            a = a + 1e-6 * one
            s = torch.linalg.vector_norm(a, dim=(1, 2), keepdim=True).clamp(max=1)
            r = _series(a / (s + 1e-8), one, 10)
            r = r @ r if bool((s >= 1).any()) else r
        case Parametrization.SCALED_TAYLOR:
            n = torch.linalg.vector_norm(a, dim=(1, 2), keepdim=True)
            s = torch.ceil(torch.log2(n + 1e-7)).clamp(min=0)
            r = _series(a / (2**s + 1e-7), one, 12)
            for _ in range(int(s.max())):
                r = r @ r
        case _:
            r = x
    result: FloatArray = r.double().numpy()
    return result


def _series(b: torch.Tensor, one: torch.Tensor, terms: int) -> torch.Tensor:
    """Σ_{k≤terms} B^k/k!, term by term, in B's own dtype."""
    total = term = one.expand_as(b)
    for k in range(1, terms + 1):
        term = term @ b / k
        total = total + term
    return total


def _relative(coarse: FloatArray, exact: FloatArray) -> float:
    return float(np.linalg.norm(coarse - exact) / np.linalg.norm(exact))
