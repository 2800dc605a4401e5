"""Double-double arithmetic on numpy arrays: about 32 digits from IEEE float64 operations.

A value is an unevaluated sum hi + lo with |lo| ≤ ulp(hi)/2 (Dekker, Numerische Mathematik 18,
1971; Hida, Li and Bailey, ARITH-15, 2001). Only elementwise +, −, ×, ÷ in a fixed order are used,
each of which IEEE 754 defines to the last bit: the results are the same on every machine.
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
    p, e = _two_product(a.hi, b.hi)
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
    """[N, r, n] · [N, n, c] → [N, r, c], terms added in the order of the inner index."""
    total: DoubleDouble | None = None
    for k in range(a.hi.shape[2]):
        left = DoubleDouble(a.hi[:, :, k, None], a.lo[:, :, k, None])
        right = DoubleDouble(b.hi[:, None, k, :], b.lo[:, None, k, :])
        term = multiply(left, right)
        total = term if total is None else add(total, term)
    if total is None:
        raise ValueError("an empty inner dimension")
    return total


def identity_like(a: DoubleDouble) -> DoubleDouble:
    """The identity for each of [N, n, n]."""
    eye = np.broadcast_to(np.eye(a.hi.shape[1]), a.hi.shape).copy()
    return from_float64(eye)


def frobenius_norm(a: FloatArray) -> FloatArray:
    """‖A‖_F of each block in float64, summed in a fixed order: [N, b, b] → [N]."""
    total = np.zeros(a.shape[0])
    for i in range(a.shape[1]):
        for j in range(a.shape[2]):
            total = total + a[:, i, j] * a[:, i, j]
    return np.sqrt(total)


def solve(a: DoubleDouble, b: DoubleDouble) -> DoubleDouble:
    """a⁻¹·b for [N, n, n] and [N, n, c] by Gauss–Jordan elimination without pivoting.

    For a whose symmetric part is positive definite, xᵀ·a·x ≥ c·‖x‖² with c > 0, as for I − A/2
    with A skew (c = 1). No pivot vanishes then: after k steps the rest of the matrix is the
    Schur complement S of the leading block, and with x = (−a₁₁⁻¹·a₁₂·y, y) one has
    a·x = (0, S·y), hence yᵀ·S·y = xᵀ·a·x ≥ c·‖x‖² ≥ c·‖y‖²: every pivot is at least c. Elements
    grow by at most ‖a‖²/c² (Golub and Van Loan, Linear Algebra Appl. 28, 1979).
    """
    size = a.hi.shape[1]
    work = DoubleDouble(np.concatenate([a.hi, b.hi], axis=2), np.concatenate([a.lo, b.lo], axis=2))
    for k in range(size):
        pivot = DoubleDouble(work.hi[:, k, k, None], work.lo[:, k, k, None])
        row = divide(DoubleDouble(work.hi[:, k], work.lo[:, k]), pivot)
        factors = DoubleDouble(work.hi[:, :, k, None].copy(), work.lo[:, :, k, None].copy())
        factors.hi[:, k] = factors.lo[:, k] = 0.0
        step = multiply(factors, DoubleDouble(row.hi[:, None], row.lo[:, None]))
        work = add(work, negate(step))
        work.hi[:, k], work.lo[:, k] = row
    return DoubleDouble(work.hi[:, :, size:], work.lo[:, :, size:])


def _two_sum(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
    """a + b = s + e exactly (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _quick_two_sum(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
    """a + b = s + e exactly, if |a| ≥ |b| (Dekker)."""
    s = a + b
    return s, b - (s - a)


def _two_product(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
    """a·b = p + e exactly, barring overflow and underflow (Dekker, with Veltkamp's split)."""
    p = a * b
    ah, al = _split(a)
    bh, bl = _split(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def _split(a: FloatArray) -> tuple[FloatArray, FloatArray]:
    t = _SPLITTER * a
    high = t - (t - a)
    return high, a - high
