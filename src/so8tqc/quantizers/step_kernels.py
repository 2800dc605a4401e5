"""Stored weights against the weights that they should stand for, compiled.

A code that was rounded says that the weight lies within half a step of it. The kernels count the
weights that do not, and sum what tells how far the stored values are from the expected ones. They
hold no lock of Python's.
"""

from __future__ import annotations

import math

import numpy as np

from so8tqc.metrics.compiled import compiled

_ARITHMETIC = 2.0**-20
"""Encoders compute a code from (w + m) / s in float32: a few roundings of 2⁻²⁴, of terms that may
cancel."""


@compiled
def compare(expected, stored, scale, least, slack, dead, group, lowest, below, above,
            outside, sums, columns):  # fmt: skip
    """Count weights outside their code's cell, and sum over rows.

    A weight beyond the ends of the grid by more than half a cell is *clipped*: some encoders let
    large weights be so, which draws stored values towards zero and says nothing of the others.

    Args:
        expected, stored: [rows, n] float32.
        scale, least, dead: [rows, n / group] float32; ``dead`` is for scales of 0.
        slack: [rows, n / group] float64, relative error of scale and min.
        group: weights of a group.
        lowest: lowest level.
        below, above: cell borders of each integer from the lowest level, in units of the scale.
        outside: [rows, n / group] int32, filled: weights outside.
        sums: [rows, 8] float64, filled, with r = stored − x: Σx², Σr² of all; of those that are
            not clipped Σx², Σx·r, Σr², Σ(r / cell)², their number and Σ|x| / cell.
        columns: [n] int64, added to: weights outside.
    """
    rows, n = expected.shape
    count = below.size
    for i in range(rows):
        sums[i, :] = 0.0
        for g in range(n // group):
            s, m = float(scale[i, g]), float(least[i, g])
            bad = 0
            inverse = 0.0 if s == 0.0 else 1.0 / s
            shift = m * inverse
            for j in range(g * group, (g + 1) * group):
                x, q = float(expected[i, j]), float(stored[i, j])
                r = q - x
                sums[i, 0] += x * x
                sums[i, 1] += r * r
                if s == 0.0:
                    wrong = not abs(r) <= dead[i, g]
                else:
                    at = math.floor((q + m) * inverse + 0.5) - lowest
                    if at < 0 or at >= count or not below[at] >= 0.0:
                        wrong = True
                    else:
                        t = (x + m) * inverse
                        d = t - (at + lowest)
                        room = slack[i, g] * (abs(t) + abs(shift))
                        room += _ARITHMETIC * (abs(x * inverse) + abs(shift) + 1.0)
                        wrong = not (-below[at] - room <= d <= above[at] + room)
                        low = min(below[at], above[at])
                        high = max(below[at], above[at])
                        cell = 2.0 * low if high == np.inf else low + high
                        outward = high == np.inf and (d < 0.0) == (below[at] == np.inf)
                        if not (outward and abs(d) > 0.5 * cell):
                            sums[i, 2] += x * x
                            sums[i, 3] += x * r
                            sums[i, 4] += r * r
                            sums[i, 5] += (d / cell) ** 2
                            sums[i, 6] += 1.0
                            sums[i, 7] += abs(x * inverse) / cell
                if wrong:
                    bad += 1
                    columns[j] += 1
            outside[i, g] = bad


@compiled
def refit(  # noqa: PLR0912  one loop, as kernels are
    expected, stored, scale, least, group, below, above, lowest, with_least, outside
):
    """Forgive groups whose codes some other scale (and min) explains.

    Code k of weight x is chosen by a and b where k − below ≤ a·x + b ≤ k + above; of two weights
    that bounds a, and without b each weight does. Such an a exists if no two bounds exclude each
    other.

    Args:
        outside: [rows, n / group] int32; where it is not 0, it becomes 0 if such an a exists.
        with_least: whether there is a b.
        Others as for :func:`compare`.
    """
    rows = expected.shape[0]
    codes = np.empty(group)
    for i in range(rows):
        for g in range(outside.shape[1]):
            if outside[i, g] == 0 or scale[i, g] == 0.0:
                continue
            s, m = float(scale[i, g]), float(least[i, g])
            first, low, high = g * group, -np.inf, np.inf
            for j in range(group):
                codes[j] = math.floor((float(stored[i, first + j]) + m) / s + 0.5)
            for j in range(group):
                x, k = float(expected[i, first + j]), codes[j]
                at = int(k) - lowest
                if at < 0 or at >= below.size:
                    low, high = 1.0, 0.0
                    break
                if not with_least:
                    bottom, top = k - below[at], k + above[at]
                    if x == 0.0:
                        if bottom > 0.0 or top < 0.0:
                            low, high = 1.0, 0.0
                    else:
                        one, two = bottom / x, top / x
                        low, high = max(low, min(one, two)), min(high, max(one, two))
                    continue
                for h in range(j):
                    y, l = float(expected[i, first + h]), codes[h]
                    other = int(l) - lowest
                    # a·(x − y) between the nearest and the furthest ends of both cells
                    bottom = (k - below[at]) - (l + above[other])
                    top = (k + above[at]) - (l - below[other])
                    if x == y:
                        if bottom > 0.0 or top < 0.0:
                            low, high = 1.0, 0.0
                    else:
                        one, two = bottom / (x - y), top / (x - y)
                        low, high = max(low, min(one, two)), min(high, max(one, two))
            slack = 1e-6 * (abs(low) + abs(high))
            sound = low <= high + (slack if np.isfinite(slack) else 0.0)
            # an a of the other sign would be another weight
            if sound and (high > 0.0 if s > 0.0 else low < 0.0):
                outside[i, g] = 0


@compiled
def deviations(expected, stored, scale, least, group, lowest, below, above, out):
    """[rows, n] float32, filled: (x − stored) / cell, at most one half beyond the grid's ends."""
    rows, n = expected.shape
    for i in range(rows):
        for j in range(n):
            s, m = float(scale[i, j // group]), float(least[i, j // group])
            out[i, j] = 0.0
            if s == 0.0:
                continue
            at = math.floor((float(stored[i, j]) + m) / s + 0.5) - lowest
            if at < 0 or at >= below.size or not below[at] >= 0.0:
                continue
            d = (float(expected[i, j]) + m) / s - (at + lowest)
            low, high = min(below[at], above[at]), max(below[at], above[at])
            cell = 2.0 * low if high == np.inf else low + high
            if high == np.inf and (d < 0.0) == (below[at] == np.inf):
                d = min(max(d, -0.5 * cell), 0.5 * cell)
            out[i, j] = d / cell
