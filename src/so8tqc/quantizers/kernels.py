"""The sweep and the descent, compiled: float64, in the order that is written.

Rows of a matrix do not depend on one another, so a chunk of them is worked on at a time, and the
sweep holds it transposed, [columns, rows]: its innermost loops run over rows, which keeps the
order of every sum and still uses the widest vectors. Nothing is reassociated or contracted.

Kernels hold no lock of Python's. They are compiled when first called, and kept beside this file.
Imported only where something is solved: numba takes a third of a second.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from so8tqc.metrics.compiled import compiled

Floats = npt.NDArray[np.float64]


class Tables(NamedTuple):
    """What the kernels know of a grid.

    Attributes:
        levels, borders: the grid's levels, and the middles between them.
        uniform: whether levels are whole numbers in a row.
        lowest: smallest code.
        block, group: sizes.
        integers: whether groups have integer scales.
        limits: [4] smallest and largest integer scale and min.
        has_min: whether groups have mins.
    """

    levels: Floats
    borders: Floats
    uniform: bool
    lowest: int
    block: int
    group: int
    integers: bool
    limits: Floats
    has_min: bool


class Search(NamedTuple):
    """Where the sweep looks for scales.

    Attributes:
        factors, widenings: for the first fit of scales.
        candidates: [c, 2] relative changes of the scale, and of the min in scales, to try.
        refits: how often scales are fitted to the codes found, and codes found again.
    """

    factors: Floats
    widenings: Floats
    candidates: Floats
    refits: int


class Coded(NamedTuple):
    """Rows as a format says them, [rows, …]; in the sweep transposed, [… , rows].

    Attributes:
        codes: n.
        scales, mins: n / group, integers.
        d, dmin: n / block.
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.int16]
    mins: npt.NDArray[np.int16]
    d: Floats
    dmin: Floats

    def transposed(self) -> Coded:
        """The same, with rows last or first."""
        return Coded(
            np.ascontiguousarray(self.codes.T),
            np.ascontiguousarray(self.scales.T),
            np.ascontiguousarray(self.mins.T),
            np.ascontiguousarray(self.d.T),
            np.ascontiguousarray(self.dmin.T),
        )


_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}

_LARGEST_HALF = 65504.0
_LEAST_NORMAL_HALF = 2.0**-14
_SPLIT_HALF = 2.0**42 + 1
"""Veltkamp's constant: rounds 53 bits to the 11 of a half-precision number."""
_SPLIT_TINY_HALF = 1.5 * 2.0**28
"""Neighbours of this float64 are 2⁻²⁴ apart, as are half-precision numbers below 2⁻¹⁴."""

_TINY = 1e-300
_ALIKE = 1e-12
"""Share of its terms below which a determinant is their rounding."""


@njit(**_OPTIONS)
def half(x):
    """The half-precision number nearest to x, as a float64."""
    if abs(x) < _LEAST_NORMAL_HALF:
        return (x + _SPLIT_TINY_HALF) - _SPLIT_TINY_HALF
    product = x * _SPLIT_HALF
    rounded = product - (product - x)
    return min(max(rounded, -_LARGEST_HALF), _LARGEST_HALF)


@njit(**_OPTIONS)
def _add_products(target, coefficients, rows):
    """target[x] += Σ_i coefficients[i] · rows[i, x], summed in the order of i."""
    count, width = len(coefficients), len(target)
    whole = count - count % 8
    for i in range(0, whole, 8):
        a, b, c, d = (
            coefficients[i],
            coefficients[i + 1],
            coefficients[i + 2],
            coefficients[i + 3],
        )
        e, f, g, h = (
            coefficients[i + 4],
            coefficients[i + 5],
            coefficients[i + 6],
            coefficients[i + 7],
        )
        for x in range(width):
            total = target[x] + a * rows[i, x]
            total = total + b * rows[i + 1, x]
            total = total + c * rows[i + 2, x]
            total = total + d * rows[i + 3, x]
            total = total + e * rows[i + 4, x]
            total = total + f * rows[i + 5, x]
            total = total + g * rows[i + 6, x]
            target[x] = total + h * rows[i + 7, x]
    for i in range(whole, count):
        a = coefficients[i]
        for x in range(width):
            target[x] = target[x] + a * rows[i, x]


_PANEL = 64


def _factor(hessian, feedback, conditional):
    """H = P Pᵀ with P upper triangular: the sweep's feedback and conditional weights.

    A row's loss δ H δᵀ is Σ_j c_j (δ_j + Σ_{i<j} δ_i a_ij)², with c_j = P_jj² and a_ij =
    P_ij / P_jj: what column j costs when the columns behind it make up for it (LDLQ).

    Args:
        hessian: [n, n], symmetric and positive definite; destroyed.
        feedback: [n, n] out, a_ij at [j, i].
        conditional: [n] out.

    Returns:
        −1, or the column at which the matrix turned out not to be positive definite.
    """
    n = len(hessian)
    # Cholesky of the matrix turned round gives P turned round
    low = hessian[::-1, ::-1].copy()
    panel = np.empty((_PANEL, n))
    negated = np.empty(_PANEL)
    for start in range(0, n, _PANEL):
        end = min(start + _PANEL, n)
        for j in range(start, end):
            pivot = low[j, j]
            for k in range(start, j):
                pivot = pivot - low[j, k] * low[j, k]
            if not pivot > 0:
                return n - 1 - j
            root = math.sqrt(pivot)
            low[j, j] = root
            for i in range(j + 1, n):
                total = low[i, j]
                for k in range(start, j):
                    total = total - low[i, k] * low[j, k]
                low[i, j] = total / root
        for k in range(start, end):
            for i in range(end, n):
                panel[k - start, i] = low[i, k]
        for i in range(end, n):
            for k in range(start, end):
                negated[k - start] = -low[i, k]
            _add_products(
                low[i, end : i + 1], negated[: end - start], panel[: end - start, end : i + 1]
            )
    for j in range(n):
        pivot = low[n - 1 - j, n - 1 - j]
        conditional[j] = pivot * pivot
        for i in range(j):
            feedback[j, i] = low[n - 1 - i, n - 1 - j] / pivot
    return -1


factor = compiled(_factor)


@njit(**_OPTIONS)
def _codes_of(x, levels, borders, uniform, lowest, codes):
    """Indices of the levels nearest to x, elementwise."""
    last = len(levels) - 1
    if uniform:
        first = levels[0]
        for r in range(len(x)):
            index = np.floor(x[r] - first + 0.5)
            codes[r] = min(max(index, lowest), last)
    else:
        codes[:] = 0.0
        for border in borders:
            for r in range(len(x)):
                codes[r] = codes[r] + (1.0 if x[r] > border else 0.0)


@njit(**_OPTIONS)
def _levels_of(codes, levels, uniform, out):
    if uniform:
        first = levels[0]
        for r in range(len(codes)):
            out[r] = first + codes[r]
    else:
        for r in range(len(codes)):
            out[r] = levels[int(codes[r])]


@njit(**_OPTIONS)
def _inverses(scale, out):
    for r in range(len(scale)):
        out[r] = 1.0 / scale[r] if scale[r] != 0.0 else 0.0


@njit(**_OPTIONS)
def _fit_scale(targets, weights, levels, borders, uniform, lowest, factors, scale):
    """Scales s that make Σ_j w_j (t_j − s·level_j)² small, levels being nearest: [rows].

    Each factor says how far the largest target goes beyond the last level on either side; for
    the codes that follow, s is the least-squares one.
    """
    group, rows = targets.shape
    extreme, best = np.zeros(rows), np.full(rows, -1.0)
    inverse, x, codes, level = np.empty(rows), np.empty(rows), np.empty(rows), np.empty(rows)
    product, square = np.empty(rows), np.empty(rows)
    for j in range(group):
        for r in range(rows):
            if abs(targets[j, r]) > abs(extreme[r]):
                extreme[r] = targets[j, r]
    scale[:] = 0.0
    for end in (levels[lowest], levels[len(levels) - 1]):
        for factor in factors:
            for r in range(rows):
                inverse[r] = end * factor / extreme[r] if extreme[r] != 0.0 else 0.0
            product[:] = 0.0
            square[:] = 0.0
            for j in range(group):
                weight = weights[j]
                for r in range(rows):
                    x[r] = targets[j, r] * inverse[r]
                _codes_of(x, levels, borders, uniform, lowest, codes)
                _levels_of(codes, levels, uniform, level)
                for r in range(rows):
                    weighted = weight * level[r]
                    product[r] = product[r] + weighted * targets[j, r]
                    square[r] = square[r] + weighted * level[r]
            for r in range(rows):
                gain = product[r] * product[r] / max(square[r], _TINY)
                if gain > best[r] and square[r] > 0.0:
                    best[r] = gain
                    scale[r] = product[r] / square[r]


@njit(**_OPTIONS)
def _fit_scale_and_min(targets, weights, steps, below_zero, widenings, scale, least):
    """Scales s and mins o that make Σ_j w_j (t_j − s·q_j + o)² small, 0 ≤ q_j ≤ steps: [rows].

    Args:
        below_zero: whether o must not be negative, nor s.
        widenings: by how many steps more or fewer the range of the targets is divided.
    """
    group, rows = targets.shape
    low, high = np.empty(rows), np.empty(rows)
    sw, st, stt = 0.0, np.zeros(rows), np.zeros(rows)
    inverse, best = np.empty(rows), np.empty(rows)
    sq, sqq, sqt = np.empty(rows), np.empty(rows), np.empty(rows)
    low[:] = targets[0]
    high[:] = targets[0]
    for j in range(group):
        weight = weights[j]
        sw = sw + weight
        for r in range(rows):
            t = targets[j, r]
            low[r] = min(low[r], t)
            high[r] = max(high[r], t)
            st[r] = st[r] + weight * t
            stt[r] = stt[r] + weight * t * t
    for r in range(rows):
        if below_zero:
            low[r] = min(low[r], 0.0)
            high[r] = max(high[r], 0.0)
        scale[r] = 0.0
        mean = st[r] / sw
        least[r] = max(-mean, 0.0) if below_zero else -mean
        best[r] = stt[r] + least[r] * (2.0 * st[r] + least[r] * sw)
    for widening in widenings:
        for r in range(rows):
            span = high[r] - low[r]
            inverse[r] = (steps + widening) / span if span > 0.0 else 0.0
        sq[:] = 0.0
        sqq[:] = 0.0
        sqt[:] = 0.0
        for j in range(group):
            weight = weights[j]
            for r in range(rows):
                t = targets[j, r]
                q = min(max(np.floor((t - low[r]) * inverse[r] + 0.5), 0.0), steps)
                weighted = weight * q
                sq[r] = sq[r] + weighted
                sqq[r] = sqq[r] + weighted * q
                sqt[r] = sqt[r] + weighted * t
        for r in range(rows):
            determinant = sw * sqq[r] - sq[r] * sq[r]
            alike = not determinant > _ALIKE * sw * sqq[r]  # one code for all: no min can be told
            if sqq[r] > 0.0 and (below_zero or not alike):
                s, o = sqt[r] / sqq[r], 0.0
                if not alike:
                    s = (sw * sqt[r] - sq[r] * st[r]) / determinant
                    o = (sq[r] * sqt[r] - sqq[r] * st[r]) / determinant
                if below_zero and o < 0.0:
                    o = 0.0
                    s = sqt[r] / sqq[r]
                loss = (
                    stt[r]
                    + s * s * sqq[r]
                    + o * o * sw
                    - 2.0 * s * sqt[r]
                    + 2.0 * o * st[r]
                    - 2.0 * s * o * sq[r]
                )
                if loss < best[r] and (s >= 0.0 or not below_zero):
                    best[r] = loss
                    scale[r] = s
                    least[r] = o


@njit(**_OPTIONS)
def _super_scale(found, largest, out):
    """Half-precision d for which the largest of the groups' numbers becomes the largest integer.

    Args:
        found: [groups, rows].
        largest: the integer whose size is greatest; of negative sign where integers are signed.
    """
    groups, rows = found.shape
    for r in range(rows):
        extreme = 0.0
        for g in range(groups):
            if abs(found[g, r]) > abs(extreme):
                extreme = found[g, r]
        out[r] = half(extreme / largest)


@njit(**_OPTIONS)
def _whole(number, unit, move, size, low, high):
    """The integer for a number in a unit, moved by a share of ``size`` but at least by one."""
    if unit == 0.0:
        return min(max(0.0, low), high)
    exact = number / unit
    rounded = np.floor(exact + 0.5)
    if move != 0.0:
        distance = max(1.0, np.floor(abs(move * size / unit) + 0.5))
        rounded = rounded + distance if move > 0.0 else rounded - distance
    return min(max(rounded, low), high)


@njit(**_OPTIONS)
def _in_format(scale, least, move, shift, integers, limits, d, dmin, has_min, s, o, whole):
    """A group's scale and min as its format can say them, near to those given.

    Args:
        scale, least: [rows] what would be best.
        move: relative change of the scale.
        shift: change of the min, in scales.
        integers: whether scales are integers times d.
        limits: [4] smallest and largest integer scale and min.
        d, dmin: [rows] of the block.
        s, o: [rows] out.
        whole: [2, rows] out, the integers.
    """
    for r in range(len(scale)):
        if integers:
            whole[0, r] = _whole(scale[r], d[r], move, scale[r], limits[0], limits[1])
            s[r] = d[r] * whole[0, r]
            if has_min:
                whole[1, r] = _whole(least[r], dmin[r], shift, scale[r], limits[2], limits[3])
                o[r] = dmin[r] * whole[1, r]
        else:
            s[r] = half(scale[r] * (1.0 + move))
            if has_min:
                o[r] = half(least[r] + shift * scale[r])


@njit(**_OPTIONS)
def _try(
    targets,
    original,
    feedback,
    conditional,
    coupled,
    levels,
    borders,
    uniform,
    lowest,
    s,
    o,
    codes,
    quantized,
    loss,
):
    """Round a group column by column with these scales, and what that costs.

    Args:
        targets: [group, rows] the columns with the errors of all before the group made up for.
        original: [group, rows] the weights.
        feedback: [group, group] of these columns.
        coupled: whether feedback is anything but zero.
        codes, quantized: [group, rows] out.
        loss: [rows] out, Σ_j c_j e_j².
    """
    group, rows = targets.shape
    inverse, x, y, level = np.empty(rows), np.empty(rows), np.empty(rows), np.empty(rows)
    delta = np.empty((group, rows))
    _inverses(s, inverse)
    loss[:] = 0.0
    for j in range(group):
        x[:] = targets[j]
        if coupled:
            _add_products(x, feedback[j, :j], delta[:j])
        for r in range(rows):
            y[r] = (x[r] + o[r]) * inverse[r]
        _codes_of(y, levels, borders, uniform, lowest, codes[j])
        _levels_of(codes[j], levels, uniform, level)
        weight = conditional[j]
        for r in range(rows):
            value = s[r] * level[r] - o[r]
            error = x[r] - value
            quantized[j, r] = value
            delta[j, r] = original[j, r] - value
            loss[r] = loss[r] + weight * error * error


@njit(**_OPTIONS)
def _refit(
    targets, original, feedback, conditional, coupled, levels, uniform, codes, has_min, scale, least
):
    """The scale and min that cost least with these codes, feedback within the group included.

    Errors are e = y − s·u + o·v, with u, v what levels and ones become by the feedback.
    """
    group, rows = targets.shape
    level, y, u = np.empty((group, rows)), np.empty(rows), np.empty(rows)
    uu, uv, yu, yv, vv = np.zeros(rows), np.zeros(rows), np.zeros(rows), np.zeros(rows), 0.0
    for j in range(group):
        _levels_of(codes[j], levels, uniform, level[j])
        y[:] = targets[j]
        u[:] = level[j]
        v = 1.0
        if coupled:
            _add_products(y, feedback[j, :j], original[:j])
            _add_products(u, feedback[j, :j], level[:j])
            for i in range(j):
                v = v + feedback[j, i]
        weight = conditional[j]
        vv = vv + weight * v * v
        for r in range(rows):
            weighted = weight * u[r]
            uu[r] = uu[r] + weighted * u[r]
            uv[r] = uv[r] + weighted * v
            yu[r] = yu[r] + weighted * y[r]
            yv[r] = yv[r] + weight * v * y[r]
    for r in range(rows):
        determinant = uu[r] * vv - uv[r] * uv[r]
        if has_min and determinant > 1e-12 * uu[r] * vv:
            scale[r] = (vv * yu[r] - uv[r] * yv[r]) / determinant
            least[r] = (uv[r] * yu[r] - uu[r] * yv[r]) / determinant
        elif uu[r] > 0.0:
            scale[r] = (yu[r] + least[r] * uv[r]) / uu[r]


def _sweep(original, feedback, conditional, coupled, grid, search, coded, quantized):
    """Round a chunk of rows, group by group, each group's error made up for by what follows.

    Args:
        original: [n, rows] weights, transposed.
        feedback, conditional: of :func:`factor`; conditional alone where not ``coupled``.
        grid: :class:`Tables`.
        search: :class:`Search`.
        coded: :class:`Coded`, transposed; out.
        quantized: [n, rows] out, the weights that they stand for.
    """
    levels, borders, uniform, lowest, block, group, integers, limits, has_min = grid
    factors, widenings, candidates, refits = search
    codes, scales, mins, d, dmin = coded
    n, rows = original.shape
    per_block = block // group
    targets = original.copy()
    first_scale, first_least = np.empty((per_block, rows)), np.zeros((per_block, rows))
    s, o, whole = np.empty(rows), np.zeros(rows), np.zeros((2, rows))
    loss, best = np.empty(rows), np.empty(rows)
    tried, value = np.empty((group, rows)), np.empty((group, rows))
    chosen, chosen_value = np.empty((group, rows)), np.empty((group, rows))
    kept = np.zeros((4, rows))
    fitted_scale, fitted_least = np.empty(rows), np.zeros(rows)
    delta = np.empty((group, rows))
    whole[0] = 1.0
    if has_min and not integers:
        whole[1] = -1.0
    for start in range(0, n, block):
        b = start // block
        for g in range(per_block):
            at = start + g * group
            if has_min:
                _fit_scale_and_min(
                    targets[at : at + group],
                    conditional[at : at + group],
                    levels[-1],
                    integers,
                    widenings,
                    first_scale[g],
                    first_least[g],
                )
            else:
                _fit_scale(
                    targets[at : at + group],
                    conditional[at : at + group],
                    levels,
                    borders,
                    uniform,
                    lowest,
                    factors,
                    first_scale[g],
                )
        if integers:
            _super_scale(first_scale, limits[1] if limits[0] == 0.0 else limits[0], d[b])
            if has_min:
                _super_scale(first_least, limits[3], dmin[b])
        for g in range(per_block):
            at = start + g * group
            end = at + group
            inner = feedback[at:end, at:end] if coupled else feedback
            best[:] = np.inf
            fitted_scale[:] = first_scale[g]
            fitted_least[:] = first_least[g]
            for attempt in range(len(candidates) + refits):
                move, shift = 0.0, 0.0
                if attempt < len(candidates):
                    move, shift = candidates[attempt, 0], candidates[attempt, 1]
                else:
                    _refit(
                        targets[at:end],
                        original[at:end],
                        inner,
                        conditional[at:end],
                        coupled,
                        levels,
                        uniform,
                        chosen,
                        has_min,
                        fitted_scale,
                        fitted_least,
                    )
                _in_format(
                    fitted_scale,
                    fitted_least,
                    move,
                    shift,
                    integers,
                    limits,
                    d[b],
                    dmin[b],
                    has_min,
                    s,
                    o,
                    whole,
                )
                _try(
                    targets[at:end],
                    original[at:end],
                    inner,
                    conditional[at:end],
                    coupled,
                    levels,
                    borders,
                    uniform,
                    lowest,
                    s,
                    o,
                    tried,
                    value,
                    loss,
                )
                for r in range(rows):
                    better = loss[r] < best[r]
                    kept[0, r] = s[r] if better else kept[0, r]
                    kept[1, r] = o[r] if better else kept[1, r]
                    kept[2, r] = whole[0, r] if better else kept[2, r]
                    kept[3, r] = whole[1, r] if better else kept[3, r]
                for j in range(group):
                    for r in range(rows):
                        better = loss[r] < best[r]
                        chosen[j, r] = tried[j, r] if better else chosen[j, r]
                        chosen_value[j, r] = value[j, r] if better else chosen_value[j, r]
                for r in range(rows):
                    best[r] = min(best[r], loss[r])
            index = at // group
            for r in range(rows):
                scales[index, r] = int(kept[2, r])
                mins[index, r] = int(kept[3, r])
                if not integers:
                    d[b, r] = kept[0, r]
                    dmin[b, r] = kept[1, r] * -1.0 if has_min else 0.0
            for j in range(group):
                for r in range(rows):
                    codes[at + j, r] = int(chosen[j, r])
                    quantized[at + j, r] = chosen_value[j, r]
                    delta[j, r] = original[at + j, r] - chosen_value[j, r]
            if coupled:
                for k in range(end, n):
                    _add_products(targets[k], feedback[k, at:end], delta)


sweep = compiled(_sweep)


@njit(**_OPTIONS)
def _nearest(x, levels, borders, uniform, lowest):
    if uniform:
        return min(max(int(np.floor(x - levels[0] + 0.5)), lowest), len(levels) - 1)
    code = 0
    for border in borders:
        if x > border:
            code += 1
    return code


@njit(**_OPTIONS)
def _move_row(gradient, hessian, column, change):
    for k in range(len(gradient)):
        gradient[k] = gradient[k] - change * hessian[column, k]


@njit(**_OPTIONS)
def _descend_codes(row, quantized, gradient, hessian, grid, s, o, codes):
    """Each column to the level that costs least while all others stay; how many moved."""
    levels, borders, uniform, lowest, group = (
        grid.levels,
        grid.borders,
        grid.uniform,
        grid.lowest,
        grid.group,
    )
    moved = 0
    for j in range(len(row)):
        scale, least = s[j // group], o[j // group]
        if scale == 0.0:
            continue
        curvature = hessian[j, j]
        wanted = quantized[j] + gradient[j] / curvature
        code = _nearest((wanted + least) / scale, levels, borders, uniform, lowest)
        if code == codes[j]:
            continue
        value = scale * levels[code] - least
        change = value - quantized[j]
        # rounding noise must not move a column to and fro
        if change * (2.0 * gradient[j] - curvature * change) <= 1e-12 * curvature * scale * scale:
            continue
        codes[j] = code
        quantized[j] = value
        _move_row(gradient, hessian, j, change)
        moved += 1
    return moved


@njit(**_OPTIONS)
def _move_group(start, values, quantized, gradient, hessian):
    for j in range(len(values)):
        change = values[j] - quantized[start + j]
        if change != 0.0:
            quantized[start + j] = values[j]
            _move_row(gradient, hessian, start + j, change)


@njit(**_OPTIONS)
def _curvature(hessian, start, first, second):
    """firstᵀ H second over the columns from ``start``."""
    total = 0.0
    for i in range(len(first)):
        inner = 0.0
        for j in range(len(second)):
            inner = inner + hessian[start + i, start + j] * second[j]
        total = total + first[i] * inner
    return total


@njit(**_OPTIONS)
def _gain(gradient, hessian, start, values, quantized):
    """By how much the loss falls when these columns take these values."""
    size = len(values)
    change = np.empty(size)
    linear = 0.0
    for j in range(size):
        change[j] = values[j] - quantized[start + j]
        linear = linear + change[j] * gradient[start + j]
    return 2.0 * linear - _curvature(hessian, start, change, change)


@njit(**_OPTIONS)
def _descend_scales(quantized, gradient, hessian, grid, s, o, scales, mins, d, dmin, codes):
    """Scales and mins that cost least while codes stay; how many moved.

    Per group the least-squares scale and min, as the format can say them; in formats with integer
    scales first the block's own ``d`` and ``dmin``.
    """
    levels, _, _, _, block, group, integers, limits, has_min = grid
    moved = 0
    n = len(quantized)
    values, level, ones = np.empty(block), np.empty(group), np.ones(group)
    for start in range(0, n, block):
        b = start // block
        if integers:
            direction = np.empty(block)
            for part in range(2 if has_min else 1):
                linear = 0.0
                for j in range(block):
                    g = (start + j) // group
                    direction[j] = (
                        scales[g] * levels[codes[start + j]] if part == 0 else -1.0 * mins[g]
                    )
                    linear = linear + direction[j] * gradient[start + j]
                curvature = _curvature(hessian, start, direction, direction)
                if not curvature > 0.0:
                    continue
                before = d[b] if part == 0 else dmin[b]
                number = half(before + linear / curvature)
                if number in (before, 0.0):
                    continue
                new_d, new_dmin = (number, dmin[b]) if part == 0 else (d[b], number)
                for j in range(block):
                    g = (start + j) // group
                    values[j] = new_d * scales[g] * levels[codes[start + j]] - new_dmin * mins[g]
                if _gain(gradient, hessian, start, values, quantized) > 0.0:
                    d[b], dmin[b] = new_d, new_dmin
                    _move_group(start, values, quantized, gradient, hessian)
                    for g in range(start // group, (start + block) // group):
                        s[g], o[g] = new_d * scales[g], new_dmin * mins[g]
                    moved += 1
        for g in range(start // group, (start + block) // group):
            at = g * group
            bu, bv = 0.0, 0.0
            for j in range(group):
                level[j] = levels[codes[at + j]]
                bu = bu + level[j] * gradient[at + j]
                bv = bv - gradient[at + j]
            uu = _curvature(hessian, at, level, level)
            if not uu > 0.0:
                continue
            new_s, new_o = s[g] + bu / uu, o[g]
            if has_min:
                uv = -_curvature(hessian, at, level, ones)
                vv = _curvature(hessian, at, ones, ones)
                determinant = uu * vv - uv * uv
                if determinant > 1e-12 * uu * vv:
                    new_s = s[g] + (vv * bu - uv * bv) / determinant
                    new_o = o[g] + (uu * bv - uv * bu) / determinant
            scale, least, m = scales[g], mins[g], new_o
            if integers:
                scale = int(_whole(new_s, d[b], 0.0, 0.0, limits[0], limits[1]))
                new_s = d[b] * scale
                if has_min:
                    least = int(_whole(new_o, dmin[b], 0.0, 0.0, limits[2], limits[3]))
                    m = dmin[b] * least
            else:
                new_s = half(new_s)
                m = half(new_o)
            if new_s == s[g] and m == o[g]:
                continue
            for j in range(group):
                values[j] = new_s * level[j] - m
            if _gain(gradient, hessian, at, values[:group], quantized) > 0.0:
                s[g], o[g], scales[g], mins[g] = new_s, m, scale, least
                if not integers:
                    d[b] = new_s
                    dmin[b] = -1.0 * m if has_min else 0.0
                _move_group(at, values[:group], quantized, gradient, hessian)
                moved += 1
    return moved


def _descend(weights, hessian, grid, passes, coded, loss):
    """Coordinate descent on δ H δᵀ of each row, codes and scales in turn.

    Args:
        weights: [rows, n].
        hessian: [n, n].
        grid: :class:`Tables`.
        passes: at most so many of each; a row ends when nothing moves.
        coded: :class:`Coded`: changed.
        loss: [rows, 2] out, δ H δᵀ before and after.
    """
    levels, block, group = grid.levels, grid.block, grid.group
    codes, scales, mins, d, dmin = coded
    rows, n = weights.shape
    groups = n // group
    s, o, delta = np.empty(groups), np.empty(groups), np.empty(n)
    quantized, gradient = np.empty(n), np.empty(n)
    for r in range(rows):
        for g in range(groups):
            b = g * group // block
            s[g], o[g] = d[r, b] * scales[r, g], dmin[r, b] * mins[r, g]
        for j in range(n):
            quantized[j] = s[j // group] * levels[codes[r, j]] - o[j // group]
            delta[j] = weights[r, j] - quantized[j]
        gradient[:] = 0.0
        _add_products(gradient, delta, hessian)
        total = 0.0
        for j in range(n):
            total = total + delta[j] * gradient[j]
        loss[r, 0] = total
        for _ in range(passes):
            moved = _descend_codes(weights[r], quantized, gradient, hessian, grid, s, o, codes[r])
            moved += _descend_scales(
                quantized,
                gradient,
                hessian,
                grid,
                s,
                o,
                scales[r],
                mins[r],
                d[r],
                dmin[r],
                codes[r],
            )
            if moved == 0:
                break
        total = 0.0
        for j in range(n):
            total = total + (weights[r, j] - quantized[j]) * gradient[j]
        loss[r, 1] = total


descend = compiled(_descend)


def _quadratic(delta, hessian, costs):
    """costs[r] = δ H δᵀ of row r.

    Args:
        delta: [rows, n].
        hessian: [n, n].
        costs: [rows] out.
    """
    rows, n = delta.shape
    gradient = np.empty(n)
    for r in range(rows):
        gradient[:] = 0.0
        _add_products(gradient, delta[r], hessian)
        total = 0.0
        for j in range(n):
            total = total + delta[r, j] * gradient[j]
        costs[r] = total


quadratic = compiled(_quadratic)
