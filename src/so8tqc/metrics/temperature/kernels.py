"""The partition function of ``metrics.temperature.table`` at every knot, as a numba kernel.

A row of logits is read once for its largest and once more, a tile at a time, for all knots:
e^{βu} is computed for the first octave of β, and squared from knot to knot an octave up. A tile and
what is computed from it stay in the nearest cache.

Imported only where temperatures are measured: numba takes a third of a second. What numba keeps of
it is made anew when this file changes, not when ``exponential`` does, which is good to its last
digit.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from so8tqc.metrics.compiled import compiled
from so8tqc.metrics.cpu_kernels import exponential, larger

TILE = 512
"""Logits; three tiles of float64 are 12 KiB."""

_SUMS = {"contract", "reassoc", "nsz"}


@njit(fastmath=_SUMS)
def _top(logits):
    """The largest logit, NaN if one is."""
    top = -np.inf
    for i in range(logits.shape[0]):
        top = larger(top, np.float64(logits[i]))
    return top


@njit
def _largest(logits):
    """The largest logit and where it is first; NaN if one is, and V."""
    width = logits.shape[0]
    top = -np.inf
    tile = 0
    for start in range(0, width, TILE):
        here = _top(logits[start : start + TILE])
        if math.isnan(here):
            return here, width
        if here > top:
            top, tile = here, start
    for place in range(tile, width):
        if logits[place] == top:
            return top, place
    return top, width


@njit(fastmath=_SUMS)
def _below(logits, top, u):
    """Write the logits' distances from the largest one."""
    for i in range(logits.shape[0]):
        u[i] = np.float64(logits[i]) - top


@njit(fastmath=_SUMS)
def _weigh(u, beta, power):
    """Write the powers e^{βu}; Σ e^{βu}, Σ u e^{βu}, Σ u² e^{βu}."""
    total = 0.0
    moment = 0.0
    square = 0.0
    for i in range(u.shape[0]):
        weight = exponential(beta * u[i])
        power[i] = weight
        total += weight
        moment += weight * u[i]
        square += weight * u[i] * u[i]
    return total, moment, square


@njit(fastmath=_SUMS)
def _square(u, power):
    """Square the powers in place; the same sums of them."""
    total = 0.0
    moment = 0.0
    square = 0.0
    for i in range(u.shape[0]):
        weight = power[i] * power[i]
        power[i] = weight
        total += weight
        moment += weight * u[i]
        square += weight * u[i] * u[i]
    return total, moment, square


@compiled
def partition(logits, betas, octave, rows, tops):
    """G and its first two derivatives in x = ln β at every knot, of each row.

    Args:
        logits: [t, V] float32 or float64.
        betas: [K], each twice the one ``octave`` places before it.
        octave: knots per octave.
        rows: [t, K, 3] float64, written: G, dG/dx, d²G/dx². Of a row with a logit that is not
            finite some are not, either.
        tops: [t] int64, written: where the largest logit is, of equal ones the first; V where a
            logit is NaN.
    """
    width = logits.shape[1]
    u = np.empty(TILE)
    power = np.empty(TILE)
    for row in range(logits.shape[0]):
        top, tops[row] = _largest(logits[row])
        sums = rows[row]
        sums[:] = 0.0
        for start in range(0, width, TILE):
            stop = min(start + TILE, width)
            tile, powers = u[: stop - start], power[: stop - start]
            _below(logits[row, start:stop], top, tile)
            for first in range(min(octave, betas.shape[0])):
                for k in range(first, betas.shape[0], octave):
                    if k == first:
                        total, moment, square = _weigh(tile, betas[k], powers)
                    else:
                        total, moment, square = _square(tile, powers)
                    sums[k, 0] += total
                    sums[k, 1] += moment
                    sums[k, 2] += square
        for k in range(betas.shape[0]):
            mean = sums[k, 1] / sums[k, 0]
            spread = sums[k, 2] / sums[k, 0] - mean * mean
            sums[k, 0] = math.log(sums[k, 0])
            sums[k, 1] = betas[k] * mean
            sums[k, 2] = betas[k] * mean + betas[k] * betas[k] * spread
