"""Double-double arithmetic on numpy arrays: about 32 digits from IEEE float64 operations.

A value is an unevaluated sum hi + lo with |lo| ≤ ulp(hi)/2 (Dekker, Numerische Mathematik 18,
1971; Hida, Li and Bailey, ARITH-15, 2001). Only elementwise +, −, ×, ÷ in a fixed order are used,
each of which IEEE 754 defines to the last bit: the results are the same on every machine.

Matrices lie *blocks last*, [r, c, N]: numpy's inner loop then runs along the N blocks, eight times
faster here than along the few columns of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from so8tqc.rotations.rotation_set import FloatArray

_SPLITTER = 134217729.0  # 2²⁷ + 1: cuts a 53-bit significand into two halves (Veltkamp)


class DoubleDouble(NamedTuple):
    """An array of double-double numbers; both parts have the same shape."""

    hi: FloatArray
    lo: FloatArray


def from_float64(values: FloatArray) -> DoubleDouble:
    """Exact."""
    return DoubleDouble(values, np.zeros_like(values))


def to_float64(value: DoubleDouble) -> FloatArray:
    """The nearest float64: hi already is hi + lo rounded."""
    return value.hi + value.lo


def from_blocks(blocks: FloatArray) -> DoubleDouble:
    """[N, r, c] → blocks last, [r, c, N]; exact."""
    return from_float64(np.ascontiguousarray(blocks.transpose(1, 2, 0)))


def to_blocks(value: DoubleDouble) -> FloatArray:
    """Blocks last, [r, c, N] → the nearest float64, [N, r, c]."""
    return np.ascontiguousarray(to_float64(value).transpose(2, 0, 1))


def add(a: DoubleDouble, b: DoubleDouble) -> DoubleDouble:
    """a + b with relative error below 2⁻¹⁰⁴ (the accurate variant of the sum)."""
    s, e = _two_sum(a.hi, b.hi)
    t, f = _two_sum(a.lo, b.lo)
    s, e = _quick_two_sum(s, e + t)
    return DoubleDouble(*_quick_two_sum(s, e + f))


def negate(a: DoubleDouble) -> DoubleDouble:
    """−a, exact."""
    return DoubleDouble(-a.hi, -a.lo)


def multiply(a: DoubleDouble, b: DoubleDouble) -> DoubleDouble:
    """a·b with relative error below 2⁻¹⁰²."""
    p, e = two_product(a.hi, b.hi)
    return DoubleDouble(*_quick_two_sum(p, e + (a.hi * b.lo + a.lo * b.hi)))


def divide(a: DoubleDouble, b: DoubleDouble) -> DoubleDouble:
    """a/b by long division: two correction steps."""
    q1 = a.hi / b.hi
    r = add(a, negate(multiply(b, from_float64(q1))))
    q2 = r.hi / b.hi
    r = add(r, negate(multiply(b, from_float64(q2))))
    q3 = r.hi / b.hi
    s, e = _quick_two_sum(q1, q2)
    return add(DoubleDouble(s, e), from_float64(q3))


def scale(a: DoubleDouble, power_of_two: float | FloatArray) -> DoubleDouble:
    """a times a power of two, exact."""
    return DoubleDouble(a.hi * power_of_two, a.lo * power_of_two)


def matmul(a: DoubleDouble, b: DoubleDouble) -> DoubleDouble:
    """[r, n, N] · [n, c, N] → [r, c, N], terms added in the order of the inner index.

    A compensated dot product: the sum of the leading parts and all its rounding errors are kept
    apart (Dot2 of Ogita, Rump and Oishi, SIAM J. Sci. Comput. 26, 2005), so the error is below
    about n²·2⁻¹⁰⁵·Σ|a||b|.

    Raises:
        ValueError: the inner dimension is empty.
    """
    if a.hi.shape[1] == 0:
        raise ValueError("an empty inner dimension")
    total, errors = _product(a, b, 0)
    for k in range(1, a.hi.shape[1]):
        term, error = _product(a, b, k)
        total, lost = _two_sum(total, term)
        errors += error + lost
    return DoubleDouble(*_quick_two_sum(total, errors))


def matmul_float64(a: FloatArray, b: FloatArray) -> FloatArray:
    """[r, n, N] · [n, c, N] → [r, c, N] in float64, terms added in the order of the inner index."""
    total: FloatArray = a[:, 0, None] * b[None, 0]
    for k in range(1, a.shape[1]):
        total += a[:, k, None] * b[None, k]
    return total


def identity_like(a: DoubleDouble) -> DoubleDouble:
    """The identity for each of [n, n, N]."""
    eye = np.broadcast_to(np.eye(a.hi.shape[0])[:, :, None], a.hi.shape).copy()
    return from_float64(eye)


def frobenius_norm(a: FloatArray) -> FloatArray:
    """‖A‖_F of each block in float64, summed in a fixed order: [b, b, N] → [N]."""
    total = np.zeros(a.shape[2])
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            total = total + a[i, j] * a[i, j]
    return np.sqrt(total)


def invert(a: DoubleDouble) -> DoubleDouble:
    """a⁻¹ of [n, n, N] by Gauss–Jordan elimination in place, without pivoting.

    For a whose symmetric part is positive definite, xᵀ·a·x ≥ c·‖x‖² with c > 0, as for I − A/2
    with A skew (c = 1). No pivot vanishes then: after k steps the rest of the matrix is the
    Schur complement S of the leading block, and with x = (−a₁₁⁻¹·a₁₂·y, y) one has
    a·x = (0, S·y), hence yᵀ·S·y = xᵀ·a·x ≥ c·‖x‖² ≥ c·‖y‖²: every pivot is at least c. Elements
    grow by at most ‖a‖²/c² (Golub and Van Loan, Linear Algebra Appl. 28, 1979).
    """
    work = DoubleDouble(a.hi.copy(), a.lo.copy())
    for k in range(a.hi.shape[0]):
        pivot = DoubleDouble(work.hi[k, k].copy(), work.lo[k, k].copy())
        factors = DoubleDouble(work.hi[:, k, None].copy(), work.lo[:, k, None].copy())
        factors.hi[k] = factors.lo[k] = 0.0
        # column k becomes that of the identity, which the elimination turns into the inverse's
        work.hi[:, k], work.lo[:, k] = 0.0, 0.0
        work.hi[k, k] = 1.0
        row = divide(DoubleDouble(work.hi[k], work.lo[k]), pivot)
        step = multiply(factors, DoubleDouble(row.hi[None], row.lo[None]))
        work = add(work, negate(step))
        work.hi[k], work.lo[k] = row
    return work


def _product(a: DoubleDouble, b: DoubleDouble, k: int) -> DoubleDouble:
    """The k-th term of every dot product: rounded, and what the rounding cut off."""
    left, right = DoubleDouble(a.hi[:, k, None], a.lo[:, k, None]), DoubleDouble(b.hi[k], b.lo[k])
    p, e = two_product(left.hi, right.hi)
    return DoubleDouble(p, e + (left.hi * right.lo + left.lo * right.hi))


def _two_sum(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
    """a + b = s + e exactly (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _quick_two_sum(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
    """a + b = s + e exactly, if |a| ≥ |b| (Dekker)."""
    s = a + b
    return s, b - (s - a)


def two_product(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
    """a·b = p + e exactly, barring overflow and underflow (Dekker, with Veltkamp's split)."""
    p = a * b
    ah, al = _split(a)
    bh, bl = _split(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def _split(a: FloatArray) -> tuple[FloatArray, FloatArray]:
    t = _SPLITTER * a
    high = t - (t - a)
    return high, a - high
