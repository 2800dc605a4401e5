"""What else a tensor may hold: another tensor, other rows, another scale, an earlier rounding.

Each hypothesis gives the weights of some rows; the one that leaves fewest of them outside their
codes' cells is what was stored, if it leaves next to none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from so8tqc.errors import ToolError
from so8tqc.gguf.file import GGUFTensor, block_layout
from so8tqc.gguf.tensor_map import FloatArray
from so8tqc.llama.ggml import encode
from so8tqc.services.tensors.measure import Measured, dequantized, measure, stored_rows
from so8tqc.services.tensors.verdict import slopes

Rows = npt.NDArray[np.intp]

_SAMPLE = 48
"""Rows that a hypothesis is tried on."""

_RATHER = 20
"""An explanation leaves outside at most one of so many weights that are outside without it."""

COARSER = (
    "Q8_0", "Q6_K", "Q5_1", "Q5_0", "Q5_K", "Q4_1", "Q4_0", "Q4_K", "IQ4_NL", "IQ4_XS", "MXFP4",
    "Q3_K", "Q2_K", "TQ2_0",
)  # fmt: skip
"""Types that a coarser source may have had, the finest first."""


class Guess(NamedTuple):
    """One hypothesis.

    Attributes:
        verdict: what it is if it holds.
        words: what was stored, in a sentence's place.
        values: rows → [rows, columns].
    """

    verdict: str
    words: str
    values: Callable[[Rows], FloatArray]


class Best(NamedTuple):
    """The hypothesis that explains a tensor."""

    guess: Guess
    outside: int
    without: int


def sample_of(found: Measured, rows: Rows | None = None) -> Rows:
    """Some of the rows that have weights outside, evenly spread."""
    hit = np.flatnonzero(found.by_row) if rows is None else rows
    chosen = np.linspace(0, len(hit) - 1, min(len(hit), _SAMPLE)).astype(np.intp)
    return hit[chosen]


def best(
    tensor: GGUFTensor, expected: FloatArray, found: Measured, rows: Rows, guesses: Iterable[Guess]
) -> Best | None:
    """The hypothesis that explains ``rows``; None if none does."""
    without = measure(tensor, _rows(expected, rows), found.rounding, rows)
    nearest: Best | None = None
    for guess in guesses:
        with np.errstate(over="ignore", invalid="ignore"):
            values = np.ascontiguousarray(guess.values(rows), dtype=np.float32)
        if values.shape != (len(rows), expected.shape[1]):
            continue
        left = measure(tensor, values, found.rounding, rows).outside
        if left * _RATHER <= without.outside and (nearest is None or left < nearest.outside):
            nearest = Best(guess, left, without.outside)
            if left == 0:
                break
    return nearest


def coarser_sources(expected: FloatArray, type_: str) -> Iterator[Guess]:
    """The tensor was rounded to another type before."""
    for coarse in COARSER:
        block, _ = block_layout(coarse)
        if coarse != type_ and expected.shape[1] % block == 0:

            def rounded(rows: Rows, coarse: str = coarse) -> FloatArray:
                values = _rows(expected, rows)
                return dequantized(encode(values, coarse), coarse, values.shape[1])

            yield Guess("coarser source", f"made from a file of {coarse}", rounded)


def scaled(expected: FloatArray, found: Measured, rows: Rows) -> Iterator[Guess]:
    """All weights times a factor, between the slopes of both regressions."""
    both = slopes(found.sums[rows])
    for share in (0.0, 0.5, 1.0, 0.25, 0.75):
        factor = 1 + both.on_expected + share * (both.on_stored - both.on_expected)
        yield Guess("edited", f"its weights times {factor:.4g}", partial(_times, expected, factor))


def shifted(expected: FloatArray) -> Iterator[Guess]:
    """A norm whose one was not added, or was added twice."""
    for step, words in (
        (-1.0, "its weights less 1: the norm's 1 was not added"),
        (1.0, "its weights plus 1: the norm's 1 was added once too often"),
    ):
        yield Guess("edited", words, partial(_plus, expected, step))


def _plus(expected: FloatArray, step: float, rows: Rows) -> FloatArray:
    return _rows(expected, rows) + np.float32(step)


def _times(expected: FloatArray, factor: float, rows: Rows) -> FloatArray:
    return _rows(expected, rows) * np.float32(factor)


def reordered(tensor: GGUFTensor, expected: FloatArray) -> Iterator[Guess]:
    """The rows of the tensor in another order, or the columns for the rows."""

    def nearest(rows: Rows) -> FloatArray:
        return _rows(expected, nearest_rows(tensor, expected, rows))

    yield Guess("edited", "its rows in another order", nearest)
    if expected.shape[0] == expected.shape[1]:
        yield Guess("edited", "its transpose", lambda its: expected.T[its])


def nearest_rows(tensor: GGUFTensor, expected: FloatArray, rows: Rows) -> Rows:
    """Of some stored rows, which expected row each is nearest to."""
    columns = expected.shape[1]
    stored = dequantized(stored_rows(tensor, rows), tensor.type, columns)
    with np.errstate(all="ignore"):
        power = np.einsum("ij,ij->i", expected, expected)
        distance = power[None, :] - 2 * (stored @ expected.T)
    found: Rows = np.argmin(np.nan_to_num(distance, nan=np.inf), axis=1).astype(np.intp)
    return found


def with_tool(guesses: Iterator[Guess]) -> Iterator[Guess]:
    """Hypotheses that need libggml, as far as it is there."""
    try:
        yield from guesses
    except ToolError:
        return


def _rows(values: FloatArray, rows: Rows) -> FloatArray:
    return np.ascontiguousarray(values[rows])
