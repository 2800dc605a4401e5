"""What a stored tensor says of itself beside the expected one, without another hypothesis.

All limits are derived in ``docs/gguf-tensors.md``: a weight outside its code's cell is none that
the code was rounded from; slopes and correlations are held against their own standard errors.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from so8tqc.gguf.file import GGUFTensor
from so8tqc.gguf.tensor_map import FloatArray
from so8tqc.services.tensors.measure import Measured, cells_of, dequantized, stored_rows

SIGMAS = 6.0
"""Of a normal distribution; beyond them lies one in 5·10⁸: no file has more rows or tensors."""

EITHER_NEIGHBOUR = 4.0
"""Over 1/12: the mean square of a deviation that is anywhere between both neighbouring codes, 1/3
of a cell². An encoder that makes up for errors errs by less; measured: 1.2 to 1.9."""

_ROWS_CORRELATED = 2048
_COLUMNS_CORRELATED = 1024


class Slopes(NamedTuple):
    """How Q follows X over some rows, less clipped weights.

    Attributes:
        on_expected: Σx·r / Σx²: 0 if rounding does not lean on the weights.
        on_stored: Σq·r / Σq²: 0 if the scales were fitted to the codes.
        error: standard error of both, from the rows' own spread.
    """

    on_expected: float
    on_stored: float
    error: float

    @property
    def leans(self) -> float:
        """How many standard errors both slopes lie on one side of 0; 0 if they include it."""
        low, high = sorted((self.on_expected, self.on_stored))
        if low <= 0 <= high:
            return 0.0
        nearest = low if low > 0 else high
        return abs(nearest) / self.error if self.error > 0 else math.inf


def slopes(sums: npt.NDArray[np.float64]) -> Slopes:
    """Of [rows, 8] sums; see ``quantizers.step_kernels.compare``."""
    xx, xr, rr = (float(sums[:, k].sum()) for k in (2, 3, 4))
    if xx <= 0:
        return Slopes(0.0, 0.0, 0.0)
    slope = xr / xx
    qq = xx + 2 * xr + rr
    spread = sums[:, 3] - slope * sums[:, 2]
    count = len(sums)
    if count > 1:
        error = math.sqrt(float((spread**2).sum()) * count / (count - 1)) / xx
    else:  # of one row: as if its errors were independent
        error = math.sqrt(rr / max(float(sums[0, 6]), 1.0) / xx)
    return Slopes(slope, (xr + rr) / qq if qq > 0 else 0.0, error)


class Region(NamedTuple):
    """Where weights lie outside their cells.

    Attributes:
        kind: ``weights``, ``rows``, ``columns``, ``blocks`` or ``everywhere``.
        parts: how many of them.
        first: their first indices; of blocks (row, first column), of weights (row, column).
    """

    kind: str
    parts: int
    first: tuple[object, ...]


def region(found: Measured) -> Region:
    """The region that describes the weights outside best: the least description length.

    Within a region weights are outside at one rate; naming each of its rows, columns or blocks
    costs the logarithm of how many there are to choose from.
    """
    rows, columns = len(found.by_row), len(found.by_column)
    hit_rows, hit_columns = np.flatnonzero(found.by_row), np.flatnonzero(found.by_column)
    groups = found.size // found.group
    choices = {
        "everywhere": (found.size, 0.0),
        "rows": (len(hit_rows) * columns, len(hit_rows) * math.log(max(rows, 2))),
        "columns": (len(hit_columns) * rows, len(hit_columns) * math.log(max(columns, 2))),
    }
    if found.group < columns:
        choices["blocks"] = (found.groups * found.group, found.groups * math.log(max(groups, 2)))
    in_a_line = min(len(hit_rows), len(hit_columns)) == 1
    if found.rule is None and in_a_line:  # of codes it is blocks that are wrong
        choices["weights"] = (found.outside, found.outside * math.log(max(found.size, 2)))
    costs = {k: _bits(found.outside, area) + named for k, (area, named) in choices.items()}
    kind = min(costs, key=lambda k: costs[k])
    match kind:
        case "rows":
            return Region(kind, len(hit_rows), tuple(map(int, hit_rows[:8])))
        case "columns":
            return Region(kind, len(hit_columns), tuple(map(int, hit_columns[:8])))
        case "weights":
            places = [(int(i), int(j)) for i in hit_rows for j in hit_columns]
            return Region(kind, found.outside, tuple(places[:8]))
        case "blocks":
            return Region(kind, found.groups, found.places[:8])
    return Region(kind, 1, ())


def _bits(outside: int, area: int) -> float:
    """Negative log likelihood (nats) of so many weights outside at one rate."""
    rate = outside / area
    kept = area - outside
    return -(outside * math.log(rate) + (kept * math.log1p(-rate) if kept else 0.0))


def correlated(tensor: GGUFTensor, expected: FloatArray, found: Measured) -> float:
    """How many σ the errors in different columns go together.

    Rounding errors of different columns are independent of one another, and so is noise that was
    added; an encoder that makes up in one column for the error of another makes them depend. Errors
    are measured in units of their group's, so that no group weighs more than another. For a pair of
    columns (Σ uᵢuⱼ)² / Σ uᵢ²uⱼ² over the rows is then about χ² with one degree of freedom under
    independence; their sum over pairs has the pairs' number as mean, and twice that as variance.
    """
    from so8tqc.quantizers.step_kernels import deviations

    assert found.rule is not None  # the caller's condition
    rule, (count, columns) = found.rule, expected.shape
    rows = np.linspace(0, count - 1, min(count, _ROWS_CORRELATED)).astype(np.intp)
    width = min(columns, _COLUMNS_CORRELATED)
    stored = stored_rows(tensor, rows)
    values = dequantized(stored, tensor.type, columns)
    rounded = np.ascontiguousarray(found.rounding.apply(np.ascontiguousarray(expected[rows])))
    scale, least, _, _ = cells_of(stored, rule)
    out = np.empty_like(rounded)
    below, above = rule.borders
    deviations(rounded, values, scale, least, rule.group, rule.levels[0], below, above, out)
    power = np.square(out).reshape(len(rows), -1, rule.group).mean(axis=2)
    with np.errstate(divide="ignore"):
        scale = np.where(power > 0, power**-0.5, 0).astype(np.float32)
    errors = (out * np.repeat(scale, rule.group, axis=1))[:, :width]
    totals, both = (a.T @ a for a in (errors, np.square(errors)))
    np.fill_diagonal(totals, 0)
    used = np.divide(np.square(totals), both, where=both > 0, out=np.zeros_like(both))
    pairs = width * (width - 1) / 2
    return float((used.sum(dtype=np.float64) / 2 - pairs) / math.sqrt(2 * pairs))
