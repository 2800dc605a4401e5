"""A matrix, the second moments of its inputs and a format in; the bytes of its rows out."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from so8tqc.errors import ShapeError
from so8tqc.quantizers.grids import GRIDS, Grid
from so8tqc.quantizers.packing import Blocks, pack

if TYPE_CHECKING:
    from so8tqc.quantizers.kernels import Search, Tables

Matrix = npt.NDArray[np.float64]

ROWS_AT_ONCE = 64
"""A chunk of rows: their targets and a group's feedback stay in a core's cache."""

PASSES = 4
"""Turns of the descent at most: later ones gained less than a thousandth in every format."""

_ROUNDING = 9


@dataclass(frozen=True)
class Curvature:
    """How much errors in a matrix' columns cost, made ready for the sweep.

    Attributes:
        hessian: [n, n] damped; None: the columns do not depend on one another.
        feedback: [n, n], a_ij at [j, i] (see ``kernels.factor``); None likewise.
        conditional: [n] a column's weight when those behind it make up for its error.
    """

    hessian: Matrix | None
    feedback: Matrix | None
    conditional: npt.NDArray[np.float64]


class Solved(NamedTuple):
    """Rows as stored, and what they cost.

    Attributes:
        stored: [rows, bytes of a row].
        swept: [rows] δ H δᵀ (H damped) after the sweep.
        descended: [rows] the same after the descent.
    """

    stored: npt.NDArray[np.uint8]
    swept: npt.NDArray[np.float64]
    descended: npt.NDArray[np.float64]


def damped(hessian: Matrix, damping: float) -> Curvature:
    """Second moments with ``damping`` times their mean added to the diagonal, and factored.

    The addition is what makes rounding errors cost something in directions that calibration
    text did not visit (GPTQ's damping).

    Args:
        hessian: [n, n] E[x xᵀ], symmetric.
        damping: share of the mean diagonal.

    Raises:
        ShapeError: not square, not finite, without any input, or not positive definite.
    """
    from so8tqc.quantizers.kernels import factor

    n = len(hessian)
    if hessian.shape != (n, n):
        raise ShapeError(f"second moments of shape {list(hessian.shape)} are not square")
    if not np.isfinite(hessian).all():
        raise ShapeError("second moments are not finite")
    diagonal = np.array([hessian[i, i] for i in range(n)])
    mean = sum(diagonal.tolist()) / n
    if not mean > 0:
        raise ShapeError("every input was zero, so that nothing says which errors cost")
    whole = np.array(hessian, dtype=np.float64)
    whole[np.arange(n), np.arange(n)] += damping * mean
    feedback, conditional = np.zeros((n, n)), np.empty(n)
    broken = factor(whole.copy(), feedback, conditional)
    if broken >= 0:
        raise ShapeError(
            f"second moments are singular at column {broken} with damping {damping:g}",
            remedy="Give more calibration text, or a larger damping.",
        )
    return Curvature(whole, feedback, conditional)


def independent(weights: npt.NDArray[np.float64]) -> Curvature:
    """Columns that are only weighed, by their mean squared inputs or alike."""
    return Curvature(None, None, weights)


def solve(
    weights: npt.NDArray[np.float32],
    curvature: Curvature,
    type_: str,
    *,
    passes: int = PASSES,
    threads: int = 1,
) -> Solved:
    """Codes and scales of a format for which δ H δᵀ of each row is small.

    Args:
        weights: [rows, n], finite.
        curvature: of the inputs.
        type_: GGML type, one of ``grids.GRIDS``; n is a multiple of its block.
        passes: turns of the descent; 0: the sweep alone.
        threads: how many chunks of rows are worked on at a time; the bytes do not depend on it.

    Raises:
        ShapeError: shapes do not fit, or a weight is not finite.
    """
    grid = GRIDS[type_]
    rows, n = weights.shape
    if n % grid.block:
        raise ShapeError(f"{n} columns are no multiple of the {grid.block} that {type_} packs")
    if n != len(curvature.conditional):
        raise ShapeError(f"{n} columns, but second moments of {len(curvature.conditional)}")
    if not np.isfinite(weights).all():
        raise ShapeError("a weight is not finite")
    stored = np.empty((rows, n // grid.block * grid.bytes), np.uint8)
    losses = np.zeros((rows, 2))

    def work(start: int) -> None:
        chunk = slice(start, min(start + ROWS_AT_ONCE, rows))
        stored[chunk] = _chunk(weights[chunk], curvature, grid, passes, losses[chunk])

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, range(0, rows, ROWS_AT_ONCE)):
            pass
    return Solved(stored, losses[:, 0].copy(), losses[:, 1].copy())


def _tables(grid: Grid) -> Tables:
    from so8tqc.quantizers.kernels import Tables

    values = grid.values
    limits = np.array([*(grid.scales or (1, 1)), *(grid.mins or (0, 0))], dtype=np.float64)
    uniform = bool((np.diff(values) == 1).all())
    return Tables(
        values,
        (values[1:] + values[:-1]) / 2,
        uniform,
        grid.lowest_code,
        grid.block,
        grid.group,
        grid.scales is not None,
        limits,
        grid.has_min,
    )


def _search(grid: Grid) -> Search:
    """Where scales are sought."""
    from so8tqc.quantizers.kernels import Search

    reach = max(abs(grid.levels[0]), abs(grid.levels[-1])) if not grid.has_min else 0
    fine = min(reach, 32) / 4 if grid.levels[-1] - grid.levels[0] != 240 else 2.0
    factors: Matrix = 1 + np.arange(-_ROUNDING, _ROUNDING + 1, dtype=np.float64) * 0.025 / max(
        fine, 1.0
    )
    widenings: Matrix = np.arange(-0.9, 1.05, 0.1)
    step = 1.0 / len(grid.levels) ** 0.5
    candidates = [(0.0, 0.0)]
    if len(grid.levels) <= 64:
        candidates += [(-step / 8, 0.0), (step / 8, 0.0), (-step / 4, 0.0), (step / 4, 0.0)]
        if grid.has_min:
            candidates += [(0.0, 0.15), (0.0, -0.15)]
    return Search(factors, widenings, np.array(candidates, dtype=np.float64), _REFITS)


_REFITS = 2


def _chunk(
    weights: npt.NDArray[np.float32],
    curvature: Curvature,
    grid: Grid,
    passes: int,
    losses: npt.NDArray[np.float64],
) -> npt.NDArray[np.uint8]:
    """[rows, bytes] of a few rows; their losses go to ``losses`` [rows, 2]."""
    from so8tqc.quantizers.kernels import Coded, descend, sweep

    rows, n = weights.shape
    tables = _tables(grid)
    original = np.ascontiguousarray(weights.T, dtype=np.float64)
    blocks, groups = n // grid.block, n // grid.group
    codes = np.empty((n, rows), np.uint8)
    scales, mins = np.empty((2, groups, rows), np.int16)
    d, dmin = np.zeros((2, blocks, rows))
    quantized = np.empty((n, rows))
    coded = Coded(codes, scales, mins, d, dmin)
    coupled = curvature.feedback is not None
    feedback = curvature.feedback if curvature.feedback is not None else np.zeros((1, 1))
    weighed = curvature.conditional
    sweep(original, feedback, weighed, coupled, tables, _search(grid), coded, quantized)
    by_row = coded.transposed()
    if curvature.hessian is not None:
        rows_of = np.ascontiguousarray(original.T)
        descend(rows_of, curvature.hessian, tables, passes, by_row, losses)
    else:
        losses[:] = _weighed(original - quantized, weighed)[:, None]
    content = Blocks(
        by_row.codes.reshape(-1, grid.block),
        by_row.scales.reshape(-1, grid.groups),
        by_row.mins.reshape(-1, grid.groups),
        by_row.d.reshape(-1).astype(np.float16),
        by_row.dmin.reshape(-1).astype(np.float16),
    )
    return pack(content, grid).reshape(rows, -1)


def _weighed(delta: Matrix, weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    total = np.zeros(delta.shape[1])
    for column, weight in zip(delta, weights, strict=True):
        total += weight * column * column
    return total


def chosen_rows(rows: int, count: int) -> Iterator[int]:
    """``count`` rows of a matrix, evenly spread; all where there are no more."""
    count = min(count, rows)
    yield from (index * rows // count for index in range(count))
