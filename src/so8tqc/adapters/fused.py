"""W + s·B·A of bfloat16 weights, added and rounded in one pass: ``rounding`` for the common case.

Float32 decides nearly every element, since bfloat16 keeps eight of its bits. With u = 2⁻²⁴ the sum
of r products and W is off by at most e = γ_{r+10}·(‖s·B_i‖·‖A_j‖ + |W_ij|) (see ``steps``; what is
above r + 1 terms is for s·B in float32, for e itself, and for adding it), whether or not products
are fused with sums. Where v − e and v + e round to one bfloat16 number, so does the exact value.
Elsewhere, one element in some hundreds, the same is asked in float64, whose u is 2⁻⁵³; the few
that are left, and numbers near the smallest, are for the exact arithmetic of ``rounding``.

Imported only where there is something to merge: numba takes a third of a second.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from so8tqc.metrics.compiled import compiled

TILE = 512
"""Columns at a time: of A they take 2 KiB a rank, and stay in the nearest caches for all rows."""

_SUMS = {"contract"}
_TERMS = 10
_HALF, _ODD = 0x7FFF, 1
_EXPONENT = 0x7F800000
_SMALL = 2.0**-120
"""Below it the float64 stage decides nothing: bfloat16's subnormals begin at 2⁻¹²⁶."""
_LEAST32, _LEAST64 = 2.0**-148, 2.0**-1073
"""Twice what a product may lose by underflow."""
_DROPPED = 45
"""Bits of float64's significand that bfloat16 does not keep."""


@njit
def _widen(words, bits, size):
    """bfloat16 words as float32, by their bits."""
    for j in range(size):
        bits[j] = np.int32(words[j]) << 16


@njit(fastmath=_SUMS)
def _add_eight(total, c, a, k, size):
    """total += c_k·a_k + … + c_{k+7}·a_{k+7}; a [r, TILE]."""
    c0, c1, c2, c3 = c[k], c[k + 1], c[k + 2], c[k + 3]
    c4, c5, c6, c7 = c[k + 4], c[k + 5], c[k + 6], c[k + 7]
    a0, a1, a2, a3 = a[k], a[k + 1], a[k + 2], a[k + 3]
    a4, a5, a6, a7 = a[k + 4], a[k + 5], a[k + 6], a[k + 7]
    for j in range(size):
        first = c0 * a0[j] + c1 * a1[j] + c2 * a2[j] + c3 * a3[j]
        second = c4 * a4[j] + c5 * a5[j] + c6 * a6[j] + c7 * a7[j]
        total[j] += first + second


@njit(fastmath=_SUMS)
def _add_one(total, c, a, size):
    """total += c·a."""
    for j in range(size):
        total[j] += c * a[j]


@njit(fastmath=_SUMS)
def _ends(weight, total, norms, reach, share, least, low, high, size):
    """The ends of the interval in which each exact value lies."""
    for j in range(size):
        error = reach * norms[j] + share * abs(weight[j]) + least
        low[j] = total[j] - error
        high[j] = total[j] + error


@njit
def _round(low, high, out, differ, size):
    """Round both ends; the numbers that are not finite, counted by their exponents."""
    special = 0
    for j in range(size):
        a = (low[j] + _HALF + ((low[j] >> 16) & _ODD)) >> 16
        b = (high[j] + _HALF + ((high[j] >> 16) & _ODD)) >> 16
        a = np.int32(0) if (a & _HALF) == 0 else a
        b = np.int32(0) if (b & _HALF) == 0 else b
        out[j] = np.uint16(a)
        differ[j] = np.uint16(a ^ b)
        special |= ((a & 0x7F80) == 0x7F80) | ((b & 0x7F80) == 0x7F80)
    return special


@njit
def _collect(differ, fours, size, places):
    """Write where the ends differ, four numbers looked at together; how many places."""
    count = 0
    for four in range((size + 3) // 4):
        if fours[four] != 0:
            for j in range(4 * four, min(4 * four + 4, size)):
                if differ[j] != 0:
                    places[count] = j
                    count += 1
    return count


@njit
def _in_float64(weight, factors, a, column, norm, reach, number, bits, single, words):
    """The bfloat16 word of one element, or −1: float64 does not decide."""
    total = np.float64(weight)
    for k in range(factors.shape[0]):
        total += factors[k] * np.float64(a[k, column])
    n = (factors.shape[0] + _TERMS) * 2.0**-53
    error = n / (1 - n) * (reach * np.float64(norm) + abs(np.float64(weight)))
    error += (factors.shape[0] + _TERMS) * _LEAST64
    if abs(total) - error < _SMALL:
        return -1
    found = np.int64(-1)
    for end in (total - error, total + error):
        number[0] = end
        odd = (bits[0] >> _DROPPED) & 1
        bits[0] = ((bits[0] + (1 << (_DROPPED - 1)) - 1 + odd) >> _DROPPED) << _DROPPED
        single[0] = np.float32(number[0])
        word = np.int64(words[0]) >> 16 & 0xFFFF
        if found >= 0 and word != found:
            return -1
        found = word
    return found


@compiled
def add_and_round(words, factors, a, norms, out, left):
    """Write W + s·B·A in bfloat16, each element rounded once, where float64 decides it.

    Args:
        words: [rows, in] uint16, W.
        factors: [rows, r] float64, s·B.
        a: [r, in] float32, A.
        norms: [in] float32, no less than ‖A_j‖.
        out: [rows, in] uint16.
        left: [n, 2] int64, receives the elements that are not decided.

    Returns:
        How many these are; −1: too many for ``left``, −2: something is not finite.
    """
    rows, columns = words.shape
    rank = a.shape[0]
    weight, total = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    low, high = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    weight_bits, low_bits, high_bits = (
        weight.view(np.int32),
        low.view(np.int32),
        high.view(np.int32),
    )
    differ, places = np.zeros(TILE, np.uint16), np.empty(TILE, np.int64)
    fours = differ.view(np.uint64)
    number, single = np.empty(1, np.float64), np.empty(1, np.float32)
    number_bits, single_bits = number.view(np.int64), single.view(np.int32)
    tile, reaches = np.empty((rank, TILE), np.float32), np.empty(TILE, np.float32)
    share = np.float32((rank + _TERMS) * 2.0**-24 * 1.001)
    least = np.float32((rank + _TERMS) * _LEAST32)
    short = factors.astype(np.float32)
    count = 0
    for start in range(0, columns, TILE):
        size = min(TILE, columns - start)
        tile[:, :size] = a[:, start : start + size]
        reaches[:size] = norms[start : start + size]
        differ[size:] = 0
        for i in range(rows):
            reach = 0.0
            for k in range(rank):
                reach += factors[i, k] * factors[i, k]
            reach = math.sqrt(reach) * (1 + 1e-9)
            words_here, out_here, factors_here = words[i, start:], out[i, start:], short[i]
            _widen(words_here, weight_bits, size)
            for j in range(size):
                total[j] = weight[j]
            whole = rank - rank % 8
            for k in range(0, whole, 8):
                _add_eight(total, factors_here, tile, k, size)
            for k in range(whole, rank):
                _add_one(total, factors_here[k], tile[k], size)
            bound = np.float32(reach * share * 1.001)
            _ends(weight, total, reaches, bound, share, least, low, high, size)
            if _round(low_bits, high_bits, out_here, differ, size):
                return -2
            for at in range(_collect(differ, fours, size, places)):
                j = places[at]
                word = _in_float64(weight[j], factors[i], tile, j, reaches[j], reach, number,
                                   number_bits, single, single_bits)  # fmt: skip
                if word >= 0:
                    out_here[j] = np.uint16(word)
                elif count == left.shape[0]:
                    return -1
                else:
                    left[count, 0], left[count, 1] = i, start + j
                    count += 1
    return count
