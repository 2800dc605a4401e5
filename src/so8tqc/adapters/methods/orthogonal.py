"""OFT, BOFT and HRA: W times orthogonal matrices.

* **OFT** (``oft/layer.py``): x_row·R by blocks, W' = W·Rᵀ; see ``rotations.files.peft_oft``.
* **BOFT** (``boft/layer.py``): S = (X − Xᵀ)/2, Q = (I − S)(I + S)⁻¹, which is the Cayley transform
  (I − A/2)⁻¹(I + A/2) of A = −2S, hence of θ = −X in A = θ − θᵀ. With P the matrix of butterfly i,
  F_i = P·diag(Q)·Pᵀ and x_row·(F_m … F_1): W' = diag(s)·W·F_1ᵀ … F_mᵀ. W·P takes the columns of W
  in the inverse order of P's, so each factor is a block product on reordered columns.
* **HRA** (``hra/layer.py``): W' = W·H, H = H_1 … H_r with H_i = I − 2·u_i·u_iᵀ/‖u_i‖². A product of
  reflections is I − U·T·Uᵀ (Schreiber and Van Loan, SIAM J. Sci. Stat. Comput. 10, 1989): adding
  H_i appends the column −τ·T·(Uᵀu_i) and the diagonal element τ = 2/‖u_i‖² to T. With
  ``apply_GS`` the u are orthonormalised first, which keeps their span: H = I − 2·U·(UᵀU)⁻¹·Uᵀ.
"""

from __future__ import annotations

import numpy as np

from so8tqc.adapters.methods.context import Context, ModuleSteps
from so8tqc.adapters.steps import BlockColumns, ScaleRows, Step, SubtractProjection
from so8tqc.errors import RotationError, ShapeError
from so8tqc.rotations import double_double as dd
from so8tqc.rotations.enums import Parametrization
from so8tqc.rotations.files.peft_oft import oft_blocks
from so8tqc.rotations.parametrization import rotation_blocks
from so8tqc.rotations.rotation_set import FloatArray


def oft(c: Context) -> ModuleSteps:
    c.only("oft_R.weight")
    blocks = oft_blocks(c.files.config, c.take("oft_R.weight"), c.files.directory, c.where)
    count, size, _ = blocks.shape
    if c.files.config.get("block_share") and count == 1 and c.shape.into % size == 0:
        blocks = np.repeat(blocks, c.shape.into // size, axis=0)
    c.require("oft_R's blocks", (blocks.shape[0] * size,), (c.shape.into,))
    columns = np.ascontiguousarray(blocks.transpose(0, 2, 1))
    return ModuleSteps((BlockColumns(columns),), zero=bool((blocks == np.eye(size)).all()))


def boft(c: Context) -> ModuleSteps:
    c.only("boft_R.weight", "boft_s.weight")
    x, s = c.take("boft_R.weight"), c.take("boft_s.weight").reshape(-1)
    if x.ndim != 4 or x.shape[2] != x.shape[3] or 0 in x.shape:
        raise ShapeError(f"boft_R has shape {list(x.shape)}, expected [m, N, b, b]", where=c.where)
    factors, count, size, _ = x.shape
    c.require("boft_R's blocks", (count * size,), (c.shape.into,))
    c.require("boft_s", s.shape, (c.shape.out,))
    steps: list[Step] = []
    for i in range(factors):
        q = rotation_blocks(-x[i], Parametrization.CAYLEY)
        order = None if factors == 1 else butterfly(c.shape.into, count >> i, size // 2)
        # (W·P)_c = W_a where P[a, c] = 1, that is where order[a] = c
        taken = None if order is None else np.argsort(order)
        steps.append(BlockColumns(np.ascontiguousarray(q.transpose(0, 2, 1)), taken))
    steps.append(ScaleRows(s))
    return ModuleSteps(tuple(steps), zero=not x.any() and bool((s == 1).all()))


def butterfly(features: int, blocks: int, half: int) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """The order of a butterfly factor: in each of ``blocks`` equal parts, pieces of ``half``
    features, the even ones first, then the odd ones (``BOFTLayer.block_butterfly_perm``)."""
    part = features // blocks
    pieces = np.arange(part).reshape(-1, half)
    one = np.concatenate([pieces[0::2], pieces[1::2]]).reshape(-1)
    order: np.ndarray[tuple[int], np.dtype[np.intp]] = (
        np.arange(0, features, part)[:, None] + one[None]
    ).reshape(-1)
    return order


def hra(c: Context) -> ModuleSteps:
    c.only("hra_u.weight")
    u = c.take("hra_u.weight")
    rank = int(c.setting("r", 8))
    c.require("hra_u", u.shape, (c.shape.into, rank))
    if not (norms := np.linalg.norm(u, axis=0)).all():
        raise RotationError(
            f"u_{int(np.argmin(norms))} is zero: it names no reflection (PEFT gives NaN)",
            where=c.where,
        )
    orthonormal = bool(c.files.config.get("apply_GS"))
    step = span_reflection(u) if orthonormal else reflections(u)
    if step is None:
        raise RotationError(
            "the u are linearly dependent: orthonormalising them divides by zero", where=c.where
        )
    return ModuleSteps((step,), zero=not orthonormal and _cancels(u))


def reflections(u: FloatArray) -> SubtractProjection:
    """H_1 … H_r of the columns of u [in, r], none of them zero."""
    return SubtractProjection(dd.to_float64(_times(u, _reflections_middle(u))), u)


def span_reflection(u: FloatArray) -> SubtractProjection | None:
    """I − 2·U·(UᵀU)⁻¹·Uᵀ, of orthonormalised columns; None if they are linearly dependent."""
    if np.linalg.matrix_rank(u) < u.shape[1]:
        return None
    middle = dd.scale(dd.invert(_gram(u)), 2.0)
    return SubtractProjection(dd.to_float64(_times(u, middle)), u)


def _cancels(u: FloatArray) -> bool:
    """Whether reflections come in equal neighbouring pairs, as PEFT initialises them."""
    return u.shape[1] % 2 == 0 and bool((u[:, 0::2] == u[:, 1::2]).all())


def _gram(u: FloatArray) -> dd.DoubleDouble:
    """UᵀU in double-double, [r, r, 1]: pairs of rows are added until one is left."""
    left = dd.from_float64(np.ascontiguousarray(u.T)[:, None, :])
    right = dd.from_float64(np.ascontiguousarray(u.T)[None, :, :])
    terms = dd.multiply(left, right)  # [r, r, D]
    while (count := terms.hi.shape[2]) > 1:
        half = count // 2
        a = dd.DoubleDouble(terms.hi[:, :, :half], terms.lo[:, :, :half])
        b = dd.DoubleDouble(terms.hi[:, :, half : 2 * half], terms.lo[:, :, half : 2 * half])
        summed = dd.add(a, b)
        if count % 2:
            summed = dd.DoubleDouble(
                np.concatenate([summed.hi, terms.hi[:, :, -1:]], axis=2),
                np.concatenate([summed.lo, terms.lo[:, :, -1:]], axis=2),
            )
        terms = summed
    return terms


def _reflections_middle(u: FloatArray) -> dd.DoubleDouble:
    """T of I − U·T·Uᵀ = H_1 … H_r, upper triangular, [r, r, 1]."""
    gram = _gram(u)
    rank = u.shape[1]
    t = dd.from_float64(np.zeros((rank, rank, 1)))
    for i in range(rank):
        norm = dd.DoubleDouble(gram.hi[i, i], gram.lo[i, i])
        tau = dd.divide(dd.from_float64(np.array([2.0])), norm)
        t.hi[i, i], t.lo[i, i] = tau.hi, tau.lo
        if i:
            head = dd.DoubleDouble(t.hi[:i, :i], t.lo[:i, :i])
            against = dd.DoubleDouble(gram.hi[:i, i : i + 1], gram.lo[:i, i : i + 1])
            column = dd.negate(dd.multiply(dd.matmul(head, against), tau))
            t.hi[:i, i : i + 1], t.lo[:i, i : i + 1] = column.hi, column.lo
    return t


def _times(u: FloatArray, middle: dd.DoubleDouble) -> dd.DoubleDouble:
    """U·M in double-double: [D, r] and [r, r, 1] → [D, r]."""
    rows = dd.from_float64(np.ascontiguousarray(u.T)[None])  # [1, r, D]
    shape = (*middle.hi.shape[:2], u.shape[0])
    spread = dd.DoubleDouble(np.broadcast_to(middle.hi, shape), np.broadcast_to(middle.lo, shape))
    product = dd.matmul(rows, spread)  # [1, r, D]
    return dd.DoubleDouble(*(np.ascontiguousarray(part[0].T) for part in product))
