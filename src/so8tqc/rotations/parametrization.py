"""How theta becomes R. Canonical: the same float64 bits on every machine.

A = θ − θᵀ is skew, so exp(A) and the Cayley transform of A are rotations. All are
evaluated in double-double arithmetic with a fixed order of operations and rounded
once to float64; a library's ``expm`` differs in the last bits from CPU to CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from so8tqc.rotations import double_double as dd
from so8tqc.rotations.double_double import DoubleDouble
from so8tqc.rotations.enums import Parametrization
from so8tqc.rotations.rotation_set import FloatArray

_BATCH = 256  # blocks at a time: intermediate arrays stay in the cache

_EXP_NORM = 2.0**-4
"""With ‖A‖ ≤ 1/16 the Taylor series cut after A¹⁶/16! is off by less than 2⁻¹¹⁶."""

_LEGACY_TERMS = 10
_LEGACY_SHIFT = 1e-6
_LEGACY_EPSILON = 1e-8

_SCALED_TERMS = 12
_SCALED_EPSILON = 1e-7


def rotation_blocks(theta: FloatArray, parametrization: Parametrization) -> FloatArray:
    """R of every block.

    Args:
        theta: [N, b, b], raw parameters (for ``matrix``: the blocks themselves), finite and
            small enough for R to be: beyond about 1e150 R comes out non-finite.
        parametrization: see the functions of this module.

    Returns:
        [N, b, b] float64. For ``exp``, ``cayley`` and ``matrix`` a block does not depend
        on the others; for ``legacy-taylor`` and ``scaled-taylor`` it does, and ``theta`` must hold
        all blocks of one layer (see :func:`legacy_taylor`, :func:`scaled_taylor`).
    """
    theta = np.ascontiguousarray(theta, dtype=np.float64)
    with np.errstate(all="ignore"):  # a RotationSet refuses what overflowed
        match parametrization:
            case Parametrization.MATRIX:
                return theta
            case Parametrization.EXP:
                return _batched(exponential, theta)
            case Parametrization.CAYLEY:
                return _batched(cayley, theta)
            case Parametrization.LEGACY_TAYLOR:
                return legacy_taylor(theta)
            case Parametrization.SCALED_TAYLOR:
                return scaled_taylor(theta)


def exponential(theta: FloatArray) -> FloatArray:
    """R = exp(A), A = θ − θᵀ: [N, b, b] → [N, b, b].

    Scaling and squaring: exp(A) = exp(A/2^s)^(2^s), with s the least integer for which
    ‖A/2^s‖_F ≤ 1/16, chosen for each block by itself, and a Taylor series (:func:`_exp_series`).
    """
    a = _skew(theta)
    squarings = _squarings(a.hi)
    result = np.empty_like(theta)
    for s in np.unique(squarings):
        chosen = squarings == s
        part = DoubleDouble(a.hi[..., chosen], a.lo[..., chosen])
        r = _exp_series(dd.scale(part, math.ldexp(1.0, -int(s))))
        for _ in range(int(s)):
            r = dd.matmul(r, r)
        result[chosen] = dd.to_blocks(r)
    return result


def cayley(theta: FloatArray) -> FloatArray:
    """R = (I − A/2)⁻¹·(I + A/2), A = θ − θᵀ: [N, b, b] → [N, b, b].

    It agrees with exp(A) up to A³/12: the two turn in the same direction. Since
    I + A/2 = 2·I − (I − A/2), it is R = 2·(I − A/2)⁻¹ − I. The symmetric part of I − A/2 is I, so
    the inverse needs no pivoting (see :func:`double_double.invert`).
    """
    half = dd.scale(_skew(theta), 0.5)
    one = dd.identity_like(half)
    twice = dd.scale(dd.invert(dd.add(one, dd.negate(half))), 2.0)
    return dd.to_blocks(dd.add(twice, dd.negate(one)))


def legacy_taylor(theta: FloatArray) -> FloatArray:
    """What the first SO8T training code computed, not expm(A): [N, b, b] → [N, b, b].

    A_r = A + 1e-6·I; for each block n = ‖A_r‖_F, s = min(n, 1), B = A_r/(s + 1e-8) and
    R = Σ_{k=0..10} B^k/k!. If any block of the layer has s ≥ 1, every block of the layer is
    squared once. So for n < 1 the block is about exp(A/n): its angle does not depend
    on the size of theta. The argument must hold all blocks of one layer.
    """
    a = _skew(theta)
    one = dd.identity_like(a)
    a = dd.add(a, dd.from_float64(one.hi * _LEGACY_SHIFT))
    norm = dd.frobenius_norm(a.hi)
    s = np.minimum(norm, 1.0)
    b = dd.divide(a, dd.from_float64(s + _LEGACY_EPSILON))
    r = _horner(b, _LEGACY_TERMS)
    if (s >= 1.0).any():
        r = dd.matmul(r, r)
    return dd.to_blocks(r)


def scaled_taylor(theta: FloatArray) -> FloatArray:
    """What a later SO8T training code computed, not expm(A): [N, b, b] → [N, b, b].

    For each block n = ‖A‖_F, s = max(0, ⌈log₂(n + 1e-7)⌉), B = A/(2^s + 1e-7) and
    R = Σ_{k=0..12} B^k/k!; then *every* block is squared max s times, the maximum taken over the
    layer. So a block turns by A·2^(max s − s): twice or more where another block of its layer is
    larger. The argument must hold all blocks of one layer.
    """
    a = _skew(theta)
    f, exponent = np.frexp(dd.frobenius_norm(a.hi) + _SCALED_EPSILON)  # n = f·2^e, f in [1/2, 1)
    s = np.maximum(exponent - (f == 0.5), 0)
    b = dd.divide(a, dd.from_float64(np.ldexp(1.0, s) + _SCALED_EPSILON))
    r = _horner(b, _SCALED_TERMS)
    for _ in range(int(s.max(initial=0)) if np.isfinite(f).all() else 0):
        r = dd.matmul(r, r)
    return dd.to_blocks(r)


def _skew(theta: FloatArray) -> DoubleDouble:
    """θ − θᵀ, exact: [N, b, b] → blocks last, [b, b, N]."""
    last = np.ascontiguousarray(theta.transpose(1, 2, 0))
    return dd.add(dd.from_float64(last), dd.from_float64(-last.transpose(1, 0, 2)))


def _exp_series(a: DoubleDouble) -> DoubleDouble:
    """Σ_{k=0..16} A^k/k! for ‖A‖ ≤ 1/16, off by less than 2⁻⁹⁸: [b, b, N] → [b, b, N].

    In powers of A⁴ (Paterson and Stockmeyer, SIAM J. Comput. 2, 1973): with
    B_i = Σ_{j<4} A^j/(4i+j)! it is B_0 + A⁴·(B_1 + A⁴·(B_2 + A⁴·(B_3 + A⁴/16!))). Since
    ‖A⁸‖/8! < 2⁻⁴⁷, B_2 and what follows need only float64.
    """
    square = dd.matmul(a, a)
    powers = (dd.identity_like(a), a, square, dd.matmul(square, a))
    fourth = dd.matmul(square, square)
    tail = dd.identity_like(a).hi * _inverse_factorial(16).hi
    for i in (3, 2):
        tail = dd.matmul_float64(fourth.hi, tail)
        for j, power in enumerate(powers):
            tail += power.hi * _inverse_factorial(4 * i + j).hi
    inner = dd.add(_combination(powers, 4), dd.from_float64(dd.matmul_float64(fourth.hi, tail)))
    return dd.add(_combination(powers, 0), dd.matmul(fourth, inner))


def _combination(powers: tuple[DoubleDouble, ...], first: int) -> DoubleDouble:
    """Σ_j powers[j]/(first + j)!, smallest terms first."""
    terms = [dd.multiply(p, _inverse_factorial(first + j)) for j, p in enumerate(powers)]
    total = terms[-1]
    for term in reversed(terms[:-1]):
        total = dd.add(total, term)
    return total


def _inverse_factorial(k: int) -> DoubleDouble:
    """1/k!, as scalars that broadcast."""
    exact = Fraction(1, math.factorial(k))
    hi = float(exact)
    return DoubleDouble(np.array(hi), np.array(float(exact - Fraction(hi))))


def _horner(a: DoubleDouble, terms: int) -> DoubleDouble:
    """Σ_{k=0..terms} A^k/k! = I + A·(I + A/2·(I + A/3·(…))): [b, b, N] → [b, b, N]."""
    one = dd.identity_like(a)
    result = one
    for k in range(terms, 0, -1):
        divisor = dd.from_float64(np.array(float(k)))
        result = dd.add(one, dd.divide(dd.matmul(a, result), divisor))
    return result


def _squarings(a: FloatArray) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Least s ≥ 0 with ‖A‖_F ≤ 2^s/16, from the exponent alone."""
    _, exponent = np.frexp(dd.frobenius_norm(a) / _EXP_NORM)  # ‖A‖·16 = f·2^e, f in [1/2, 1)
    return np.maximum(exponent, 0).astype(np.int64)


def _batched(function: Callable[[FloatArray], FloatArray], theta: FloatArray) -> FloatArray:
    """In one thread: numpy's operations on so small arrays spend as long on its lock as on them."""
    result = np.empty_like(theta)
    for start in range(0, theta.shape[0], _BATCH):
        result[start : start + _BATCH] = function(theta[start : start + _BATCH])
    return result
