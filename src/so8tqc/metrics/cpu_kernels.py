"""The statistics of ``metrics.distributions`` on a CPU, as numba kernels.

A row of logits is read twice for one model, and once for a pair, or twice where some |x| > 1, in
the dtype it has; all arithmetic is in float64. Of its length only the weights e^(z − max z) are
written. The kernels hold no lock of Python's, so that threads work side by side, and use the widest
vectors that the processor has. They are compiled when they are first called, in seconds, and kept
beside this file, or where numba keeps such things for the user.

Sums may be taken in any order; the exponential and x are computed in the order that is written.

Imported only where something is compared: numba takes a third of a second.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from so8tqc.metrics.compiled import compiled

LEADERS = 5
"""How many of the most likely tokens are found (top-5 overlap)."""

_STEPS = {"contract"}
_SUMS = {"contract", "reassoc", "nsz"}

_GROUPS = 1024
"""Tokens v with the same v mod 1024 are a group, of which only the largest logit is looked at,
unless it may lead."""

_NEAR = 0.5
"""|x| below which x² … are taken from power series."""

_MODERATE = 1.0
"""|x| up to which the Jensen-Shannon term is taken from its power series."""

_LOG2_E = 1 / math.log(2)
_LN2 = math.log(2)
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
"""ln 2 in two parts (fdlibm, e_exp.c), the first of 32 bits: a whole number times it is exact."""

_INTEGRAL = 1.5 * 2.0**52
"""A float64 of this size has whole numbers for neighbours: adding it rounds, and the last bits of
the sum are the whole number."""

_LEAST = -708.0
"""Below this x, e^x is no longer a normal float64, and is taken for zero."""


def _bernoulli(n: int) -> list[Fraction]:
    """Bernoulli numbers B_0 … B_n, exact, by their recurrence Σ_k C(m+1, k) B_k = 0.

    ``scipy.special.bernoulli`` gives twelve digits of some: fewer than a float64 has.
    """
    numbers = [Fraction(1)]
    for m in range(1, n + 1):
        known = sum((math.comb(m + 1, k) * numbers[k] for k in range(m)), start=Fraction(0))
        numbers.append(-known / (m + 1))
    return numbers


_B = _bernoulli(22)
_E = tuple(1 / math.factorial(k) for k in range(14))
"""e^r = Σ E_k r^k; to r^13 good to a float64's last digit for |r| ≤ ½ ln 2."""

_G = tuple(1 / math.factorial(k + 2) for k in range(12))
"""(e^x − 1 − x)/x² = Σ G_k x^k; to x^11 good to 1e-14 for |x| ≤ ½."""

_S = tuple(
    float((4**k - 1) * _B[2 * k] / math.factorial(2 * k) * (1 - Fraction(1, 2 * k)))
    for k in range(1, 12)
)
"""(t tanh t − ln cosh t)/x² = Σ S_k x^2k for t = x/2; to x^20 good to 1e-10 for |x| ≤ 1.

tanh t = Σ 4^k (4^k − 1) B_2k/(2k)! t^(2k−1), and ln cosh is its integral."""

_L = tuple(2 / (2 * k + 1) for k in range(9))
"""ln(1 + y) = ln((1 + s)/(1 − s)) = s Σ L_k s^2k for s = y/(2 + y); to s^16 good to 1e-14 for
y ≤ 1/e."""


@intrinsic
def _bits(_context, _number):
    """The bits of a float64 as an int64."""

    def code(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.int64(types.float64), code


@intrinsic
def _number(_context, _bits):
    """The float64 of an int64's bits."""

    def code(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), code


@intrinsic
def larger(_context, _a, _b):
    """The larger of two float64, NaN if one is; unlike ``max`` it can be taken in any order."""

    def code(_context, builder, _signature, arguments):
        double = ir.DoubleType()
        kind = ir.FunctionType(double, [double, double])
        maximum = builder.module.declare_intrinsic("llvm.maximum", [double], kind)
        return builder.call(maximum, arguments)

    return types.float64(types.float64, types.float64), code


@njit(fastmath=_STEPS)
def exponential(x):
    """e^x = 2^n e^r with x = n ln 2 + r: within a unit in the last place, for x ≤ 0."""
    shifted = x * _LOG2_E + _INTEGRAL
    n = shifted - _INTEGRAL
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    series = _E[13]
    series = series * r + _E[12]
    series = series * r + _E[11]
    series = series * r + _E[10]
    series = series * r + _E[9]
    series = series * r + _E[8]
    series = series * r + _E[7]
    series = series * r + _E[6]
    series = series * r + _E[5]
    series = series * r + _E[4]
    series = series * r + _E[3]
    series = series * r + _E[2]
    series = series * r + _E[1]
    series = series * r + _E[0]
    power = _number((_bits(shifted) + 1023) << 52)
    return 0.0 if x < _LEAST else series * power


@njit(fastmath=_STEPS)
def _log_ratio(z, w, shift):
    """x = (w − z) − shift, to the last digit the same in every loop: those of |x| ≤ 1 and of
    |x| > 1 must not both take a token, nor both leave it."""
    return (np.float64(w) - np.float64(z)) - shift


@njit
def _raise_to(best, logits):
    """Replace each element of ``best`` by the logit at its place where that is larger."""
    for i in range(logits.shape[0]):
        best[i] = logits[i] if logits[i] > best[i] else best[i]


@njit
def _find_leaders(logits, leaders):
    """Places of the largest logits, in order, of equal ones the first before the others; V where
    there are fewer. The largest five are in the groups whose largest are not below the fifth of
    the groups' largest."""
    width = logits.shape[0]
    leaders[:] = width
    best = np.full(_GROUPS, -np.inf, logits.dtype)
    for start in range(0, width, _GROUPS):
        _raise_to(best, logits[start : start + _GROUPS])
    largest = np.full(LEADERS, -np.inf, logits.dtype)
    for group in range(_GROUPS):
        _insert(largest, leaders, best[group], width)
    least = largest[-1]
    largest[:] = -np.inf
    for group in range(min(_GROUPS, width)):
        if best[group] >= least:
            for place in range(group, width, _GROUPS):
                _insert(largest, leaders, logits[place], place)
    return largest[0]


@njit
def _insert(largest, leaders, logit, place):
    """Put a logit where it belongs among the largest, and its place beside it."""
    at = LEADERS
    while at > 0 and (
        logit > largest[at - 1] or (logit == largest[at - 1] and place < leaders[at - 1])
    ):
        at -= 1
        if at < LEADERS - 1:
            largest[at + 1] = largest[at]
            leaders[at + 1] = leaders[at]
    if at < LEADERS:
        largest[at] = logit
        leaders[at] = place


@njit(fastmath=_SUMS)
def _weigh(logits, top, weights):
    """Write the weights w = e^(z − top); Σ w, Σ w (z − top), Σ w²."""
    total = 0.0
    moment = 0.0
    square = 0.0
    for i in range(logits.shape[0]):
        below = np.float64(logits[i]) - top
        weight = exponential(below)
        weights[i] = weight
        total += weight
        moment += weight * below
        square += weight * weight
    return total, moment, square


@compiled
def side_rows(logits, targets, weights, numbers, leaders):
    """One model's distribution in each row.

    Args:
        logits: [t, V] float32 or float64.
        targets: [t] int64, the tokens that follow, each in the vocabulary.
        weights: [t, V] float64, written: e^(z − max z).
        numbers: [t] of ``columns.SIDE_ROW``, written. Where a logit of the row is not finite, the
            entropy is not, either.
        leaders: [t, LEADERS] int64, written: the places of the largest logits in order, of equal
            ones the first before the others; V where there are fewer.
    """
    for row in range(logits.shape[0]):
        top = np.float64(_find_leaders(logits[row], leaders[row]))
        total, moment, square = _weigh(logits[row], top, weights[row])
        log_total = math.log(total)
        z_target = np.float64(logits[row, targets[row]])
        out = numbers[row]
        out["log_normaliser"] = top + log_total
        out["nll"] = (top - z_target) + log_total
        out["entropy"] = log_total - moment / total
        out["max_prob"] = 1 / total
        out["max_logit"] = top
        # Σ(p − y)² = Σp² − 2·p_target + 1 for a one-hot y
        out["brier"] = square / (total * total) - 2 * weights[row, targets[row]] / total + 1


@njit(fastmath=_SUMS)
def _differences(z, w, p_weights, q_weights, p_scale, q_scale, shift):
    """The sums of a row: Σ p φ(x), Σ q φ(−x), twice the Jensen-Shannon terms of |x| ≤ 1; max |d|,
    Σ |d|, Σ d². ``metrics.distributions`` has the symbols."""
    kl = 0.0
    reverse = 0.0
    js = 0.0
    largest = 0.0
    total = 0.0
    square = 0.0
    for i in range(z.shape[0]):
        d = np.float64(w[i]) - np.float64(z[i])
        size = abs(d)
        largest = larger(largest, size)
        total += size
        square += d * d
        x = _log_ratio(z[i], w[i], shift)
        p = p_weights[i] * p_scale
        q = q_weights[i] * q_scale
        u = x * x
        even = ((((_G[10] * u + _G[8]) * u + _G[6]) * u + _G[4]) * u + _G[2]) * u + _G[0]
        odd = ((((_G[11] * u + _G[9]) * u + _G[7]) * u + _G[5]) * u + _G[3]) * u + _G[1]
        odd *= x
        near = u < _NEAR * _NEAR
        kl += p * u * (even + odd) if near else q - p - p * x
        reverse += q * u * (even - odd) if near else p - q + q * x
        spread = _S[10]
        spread = spread * u + _S[9]
        spread = spread * u + _S[8]
        spread = spread * u + _S[7]
        spread = spread * u + _S[6]
        spread = spread * u + _S[5]
        spread = spread * u + _S[4]
        spread = spread * u + _S[3]
        spread = spread * u + _S[2]
        spread = spread * u + _S[1]
        spread = spread * u + _S[0]
        js += (p + q) * u * spread if u <= _MODERATE * _MODERATE else 0.0
    return kl, reverse, js, largest, total, square


@njit(fastmath=_SUMS, error_model="numpy")
def _far_js(z, w, p_weights, q_weights, p_scale, q_scale, shift):
    """Twice the Jensen-Shannon terms of |x| > 1 of a row, in closed form: with y = e^−|x|,
    t tanh t − ln cosh t = ln 2 − ln(1 + y) − |x| y/(1 + y)."""
    js = 0.0
    for i in range(z.shape[0]):
        x = abs(_log_ratio(z[i], w[i], shift))
        both = p_weights[i] * p_scale + q_weights[i] * q_scale
        y = exponential(-x)
        s = y / (2 + y)
        u = s * s
        log = _L[8]
        log = log * u + _L[7]
        log = log * u + _L[6]
        log = log * u + _L[5]
        log = log * u + _L[4]
        log = log * u + _L[3]
        log = log * u + _L[2]
        log = log * u + _L[1]
        log = log * u + _L[0]
        spread = _LN2 - s * log - x * (y / (1 + y))
        js += both * spread if x > _MODERATE else 0.0
    return js


@njit
def _shared(first, second, width):
    """Share of one row's leaders that are among the other's."""
    found = 0
    count = 0
    for leader in first:
        if leader < width:
            count += 1
            for other in second:
                found += leader == other
    return found / count


@compiled
def pair_rows(
    z, w, p_weights, q_weights, reference, candidate, leaders, other_leaders, targets, rows
):
    """A row of the token table for each position.

    Args:
        z, w: [t, V] logits of the reference and the candidate, float32 or float64.
        p_weights, q_weights: [t, V] float64, theirs of :func:`side_rows`.
        reference, candidate: [t] of ``columns.SIDE_ROW``, likewise.
        leaders, other_leaders: [t, LEADERS] int64, likewise.
        targets: [t] int64, the tokens that follow.
        rows: [t] of ``columns.ROW``, written.
    """
    width = z.shape[1]
    for row in range(z.shape[0]):
        ours = reference[row]
        theirs = candidate[row]
        # L_w − L_z; from the largest logits, as their size may have cost the sums' last digits
        p_max, q_max = ours["max_prob"], theirs["max_prob"]
        shift = (theirs["max_logit"] - ours["max_logit"]) + math.log(p_max / q_max)
        side = (z[row], w[row], p_weights[row], q_weights[row], p_max, q_max, shift)
        kl, reverse, js, largest, total, square = _differences(*side)
        if largest + abs(shift) > _MODERATE:
            js += _far_js(*side)
        out = rows[row]
        out["nll_reference"], out["nll_candidate"] = ours["nll"], theirs["nll"]
        out["entropy_reference"], out["entropy_candidate"] = ours["entropy"], theirs["entropy"]
        out["max_prob_reference"], out["max_prob_candidate"] = p_max, q_max
        out["max_logit_reference"] = ours["max_logit"]
        out["max_logit_candidate"] = theirs["max_logit"]
        out["brier_reference"], out["brier_candidate"] = ours["brier"], theirs["brier"]
        out["kl"] = kl
        out["kl_reverse"] = reverse
        out["js"] = js / 2
        out["delta_p"] = math.exp(-theirs["nll"]) - math.exp(-ours["nll"])
        top = leaders[row, 0]
        other_top = other_leaders[row, 0]
        out["same_top"] = top == other_top
        out["top5_overlap"] = _shared(leaders[row], other_leaders[row], width)
        out["correct_reference"] = top == targets[row]
        out["correct_candidate"] = other_top == targets[row]
        out["max_abs_logit"] = largest
        out["sum_abs_logit"] = total
        out["sum_square_logit"] = square
