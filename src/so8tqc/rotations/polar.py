"""The rotation nearest to a matrix: its orthogonal polar factor, canonical to the last bit.

X = U·H with U orthogonal and H symmetric positive definite; U minimises ‖X − U‖_F among all
orthogonal matrices (Higham, SIAM J. Sci. Stat. Comput. 7, 1986). U is computed in double-double
like every other rotation, because LAPACK's singular vectors differ from CPU to CPU.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from so8tqc.rotations import double_double as dd
from so8tqc.rotations.double_double import DoubleDouble
from so8tqc.rotations.rotation_set import FloatArray

_BATCH = 256  # blocks at a time: intermediate arrays stay in the cache
_ENOUGH = 2.0**-53
"""‖XᵀX − I‖_max after which one more step is exact: a step squares the error."""
_MAX_STEPS = 60
"""A step multiplies a small singular value by 1.5: those above 1.5⁻⁵⁰ ≈ 10⁻⁹ converge."""


def nearest_rotations(blocks: FloatArray) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """The orthogonal polar factor of each block by the Newton–Schulz iteration.

    X ← X·(3I − XᵀX)/2 keeps the singular vectors and maps every singular value σ to
    σ(3 − σ²)/2, which converges to 1, quadratically at last, for σ in (0, √3). A block is
    first divided by a power of two that makes ‖X‖_F ≤ 1, hence σ ≤ 1; this does not change
    U. The sign of the determinant is kept, so U is a rotation where det X > 0.

    Args:
        blocks: [N, b, b], finite.

    Returns:
        [N, b, b] polar factors, and [N] whether a block has one: False for a singular block,
        whose factor is not unique; it is returned as it came.
    """
    result = blocks.copy()
    exists = np.ones(len(blocks), dtype=np.bool_)
    for start in range(0, len(blocks), _BATCH):
        part = slice(start, start + _BATCH)
        result[part], exists[part] = _newton_schulz(blocks[part])
    return result, exists


def _newton_schulz(blocks: FloatArray) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    _, exponent = np.frexp(np.abs(blocks).max(axis=(1, 2)))
    scaled = np.ldexp(blocks, -exponent[:, None, None])  # first: a norm could overflow
    norms = dd.frobenius_norm(dd.from_blocks(scaled).hi)
    _, exponent = np.frexp(norms)
    scaled = np.ldexp(scaled, -exponent[:, None, None])
    result = blocks.copy()
    active = np.flatnonzero(norms > 0)
    x = dd.from_blocks(scaled[active])
    for _ in range(_MAX_STEPS):
        if active.size == 0:
            break
        x, error = _step(x)
        done = error <= _ENOUGH
        result[active[done]] = dd.to_blocks(x)[done]
        active, x = active[~done], DoubleDouble(x.hi[..., ~done], x.lo[..., ~done])
    exists = norms > 0
    exists[active] = False
    return result, exists


def _step(x: DoubleDouble) -> tuple[DoubleDouble, FloatArray]:
    """X − X·E/2 with E = XᵀX − I, and the largest |E| of each block before the step.

    x lies blocks last, [b, b, N].
    """
    transposed = DoubleDouble(x.hi.transpose(1, 0, 2), x.lo.transpose(1, 0, 2))
    e = dd.add(dd.matmul(transposed, x), dd.negate(dd.identity_like(x)))
    error: FloatArray = np.abs(e.hi).max(axis=(0, 1))
    return dd.add(x, dd.negate(dd.scale(dd.matmul(x, e), 0.5))), error
