"""A stored tensor beside the weights that it should stand for, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from so8tqc.errors import MissingToolError
from so8tqc.gguf.file import GGUFTensor, block_layout
from so8tqc.gguf.tensor_map import FloatArray, stored_as
from so8tqc.llama.ggml import dequantizer
from so8tqc.quantizers.steps import RULES, Rule, groups_of, largest_dead, scale_slack

PLAIN = frozenset({"F64", "F32", "F16", "BF16"})
"""Types that round a weight, and no more."""

INTEGERS = frozenset({"I8", "I16", "I32", "I64"})

_CHUNK = 1 << 18
"""Weights that are looked at together: a few arrays of them stay in a core's cache."""

_PLACES = 4096
"""Groups whose places are kept."""

_PLAIN_GROUP = 32
"""Weights that are named together where a type has no groups."""

Counts = npt.NDArray[np.int64]
Sums = npt.NDArray[np.float64]


class Rounding(NamedTuple):
    """What a weight went through before the file's type: an F16 or BF16 file, or none."""

    words: str
    apply: Callable[[FloatArray], FloatArray]


def _through_f16(values: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


def _through_bf16(values: FloatArray) -> FloatArray:
    import torch

    return torch.from_numpy(values).to(torch.bfloat16).float().numpy()


ROUNDINGS = (
    Rounding("", lambda values: values),
    Rounding("through F16", _through_f16),
    Rounding("through BF16", _through_bf16),
)


@dataclass(frozen=True)
class Measured:
    """A stored tensor Q beside the expected one X; R = Q − X.

    Attributes:
        rule: the type's, None where codes are not rounded one by one.
        outside: weights that are not what their code stands for: outside its cell or, in plain
            types, other than the rounded weight. 0 for types without a rule.
        by_row, by_column: [rows], [columns] of them.
        places: (row, first column) of the first groups with such weights.
        groups: how many groups have some.
        group: weights of a group.
        sums: [rows, 8], see ``quantizers.step_kernels.compare``.
        non_finite: stored weights that are NaN or infinite.
        largest: largest |Q|.
        rounding: what explains most of the weights.
    """

    rule: Rule | None
    outside: int
    by_row: Counts
    by_column: Counts
    places: tuple[tuple[int, int], ...]
    groups: int
    group: int
    sums: Sums
    non_finite: int
    largest: float
    rounding: Rounding

    @property
    def size(self) -> int:
        """Weights of the tensor."""
        return len(self.by_row) * len(self.by_column)

    @property
    def error(self) -> float:
        """‖Q − X‖ / ‖X‖."""
        xx, rr = float(self.sums[:, 0].sum()), float(self.sums[:, 1].sum())
        return (rr / xx) ** 0.5 if xx > 0 else (0.0 if rr == 0 else float("inf"))

    @property
    def over_grid(self) -> float | None:
        """Mean square deviation in units of the cell, over that of rounding, 1/12."""
        count = float(self.sums[:, 6].sum())
        if self.rule is None or count == 0:
            return None
        return 12 * float(self.sums[:, 5].sum()) / count

    @property
    def shows(self) -> tuple[float, float, float] | None:
        """Smallest relative change of the whole tensor, of a row and of a group that shows.

        A change by a factor 1 + δ puts a weight x out of its cell with probability δ·|x| / cell; of
        three that are expected, none is seen in one case out of twenty.
        """
        reach = float(self.sums[:, 7].sum())
        if self.rule is None or reach <= 0:
            return None
        rows = len(self.by_row)
        return tuple(_EXPECTED * n / reach for n in (1, rows, self.size / self.group))  # type: ignore[return-value]


_EXPECTED = 3.0
"""exp(−3) = 0.05."""


def as_matrix(values: FloatArray, tensor: GGUFTensor) -> FloatArray:
    """[rows, columns] of a tensor of one dimension or more."""
    return np.ascontiguousarray(values.reshape(-1, tensor.shape[-1]))


def measure(
    tensor: GGUFTensor,
    expected: FloatArray,
    rounding: Rounding = ROUNDINGS[0],
    rows: npt.NDArray[np.intp] | None = None,
) -> Measured:
    """Compare a tensor with [rows, columns] expected weights.

    Args:
        tensor: the stored one.
        expected: of all rows, or of ``rows``.
        rounding: what they went through.
        rows: which rows of the tensor; None: all.
    """
    if tensor.type in PLAIN:
        return _measure_plain(tensor, expected, rounding, rows)
    return _measure_codes(tensor, expected, rounding, rows)


def stored_rows(tensor: GGUFTensor, rows: npt.NDArray[np.intp] | slice) -> npt.NDArray[np.uint8]:
    """[rows, bytes] of some rows as they are stored."""
    block, size = block_layout(tensor.type)
    width = tensor.shape[-1] // block * size
    data = tensor.raw.reshape(-1, width)[rows]
    return np.ascontiguousarray(data)


def dequantized(stored: npt.NDArray[np.uint8], type_: str, columns: int) -> FloatArray:
    """[rows, bytes] → [rows, columns], by libggml where it is installed, else by gguf-py."""
    out = np.empty((len(stored), columns), np.float32)
    if type_ == "F64":
        return stored.view(np.float64).astype(np.float32)
    try:
        dequantizer(type_)(stored.reshape(-1), out.reshape(-1))
    except MissingToolError:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        out[:] = dequantize(stored, GGMLQuantizationType[type_])
    return out


def _chunks(count: int, columns: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, columns))
    for start in range(0, count, step):
        yield slice(start, min(count, start + step))


def _measure_plain(
    tensor: GGUFTensor,
    expected: FloatArray,
    rounding: Rounding,
    rows: npt.NDArray[np.intp] | None,
) -> Measured:
    count, columns = expected.shape
    found = _Found(count, columns, _PLAIN_GROUP if columns % _PLAIN_GROUP == 0 else columns)
    for part in _chunks(count, columns):
        stored = stored_rows(tensor, part if rows is None else rows[part])
        rounded = np.ascontiguousarray(rounding.apply(expected[part]))
        with np.errstate(over="ignore"):
            right = np.ascontiguousarray(_as_stored(rounded, tensor.type)).view(np.uint8)
        values = dequantized(stored, tensor.type, columns)
        wrong = values != dequantized(right.reshape(stored.shape), tensor.type, columns)
        found.add(part, values, rounded, wrong)
    return found.measured(None, rounding)


def _as_stored(values: FloatArray, type_: str) -> npt.NDArray[np.generic]:
    if type_ == "F64":
        return values.astype(np.float64)
    return stored_as(values, type_)


class _Found:
    """What is gathered while rows are read."""

    def __init__(self, rows: int, columns: int, group: int) -> None:
        self.by_row = np.zeros(rows, np.int64)
        self.by_column = np.zeros(columns, np.int64)
        self.sums = np.zeros((rows, 8))
        self.places: list[tuple[int, int]] = []
        self.groups = 0
        self.group = group
        self.non_finite = 0
        self.largest = 0.0

    def see(self, values: FloatArray) -> None:
        """Note what a chunk of stored values is by itself."""
        finite = np.isfinite(values)
        self.non_finite += int(values.size - np.count_nonzero(finite))
        if values.size:
            self.largest = max(self.largest, float(np.max(np.abs(values), where=finite, initial=0)))

    def add(
        self,
        part: slice,
        values: FloatArray,
        expected: FloatArray,
        wrong: npt.NDArray[np.bool_],
    ) -> None:
        """Add a chunk of a type whose codes are not looked at one by one."""
        self.see(values)
        x = expected.astype(np.float64)
        with np.errstate(all="ignore"):
            r = values - x
            xx, xr, rr = ((a * b).sum(axis=1) for a, b in ((x, x), (x, r), (r, r)))
        none = np.zeros_like(xx)
        count = np.full_like(xx, x.shape[1])
        self.sums[part] = np.stack([xx, rr, xx, xr, rr, none, count, none], axis=1)
        self.by_row[part] = wrong.sum(axis=1)
        self.by_column += wrong.sum(axis=0)
        self.note(part, wrong.reshape(len(wrong), -1, self.group).sum(axis=2))

    def note(self, part: slice, outside: npt.NDArray[np.integer]) -> None:
        """Keep the places of groups with weights outside."""
        rows, groups = np.nonzero(outside)
        self.groups += len(rows)
        for i, g in zip(rows[: _PLACES - len(self.places)], groups, strict=False):
            self.places.append((int(part.start + i), int(g) * self.group))

    def measured(self, rule: Rule | None, rounding: Rounding) -> Measured:
        return Measured(
            rule,
            int(self.by_row.sum()),
            self.by_row,
            self.by_column,
            tuple(self.places),
            self.groups,
            self.group,
            self.sums,
            self.non_finite,
            self.largest,
            rounding,
        )


class Cells(NamedTuple):
    """Of some rows: what their groups share, as the kernels take it."""

    scale: FloatArray
    least: FloatArray
    slack: Sums
    dead: FloatArray


def cells_of(stored: npt.NDArray[np.uint8], rule: Rule) -> Cells:
    """[rows, bytes] → [rows, groups] each."""
    groups = groups_of(stored.reshape(-1, rule.bytes), rule)
    rows = len(stored)

    def by_row(part: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.ascontiguousarray(part).reshape(rows, -1)

    return Cells(
        by_row(groups.scale),
        by_row(groups.least),
        by_row(scale_slack(groups, rule)),
        by_row(largest_dead(groups, rule)),
    )


def _measure_codes(
    tensor: GGUFTensor,
    expected: FloatArray,
    rounding: Rounding,
    rows: npt.NDArray[np.intp] | None,
) -> Measured:
    from so8tqc.quantizers.step_kernels import compare, refit

    count, columns = expected.shape
    rule = RULES.get(tensor.type)
    group = rule.group if rule else columns  # without a rule nothing is counted
    found = _Found(count, columns, group)
    for part in _chunks(count, columns):
        stored = stored_rows(tensor, part if rows is None else rows[part])
        values = dequantized(stored, tensor.type, columns)
        rounded = np.ascontiguousarray(rounding.apply(expected[part]))
        if rule is None:
            found.add(part, values, rounded, np.zeros(values.shape, bool))
            continue
        found.see(values)
        scale, least, slack, dead = cells_of(stored, rule)
        below, above = rule.borders
        outside = np.zeros(scale.shape, np.int32)
        columns_outside = np.zeros(columns, np.int64)
        lowest = rule.levels[0]
        compare(
            rounded, values, scale, least, slack, dead, group, lowest, below, above,
            outside, found.sums[part], columns_outside,
        )  # fmt: skip
        if rule.refitted and outside.any():
            before = outside.copy()
            with_least = bool(least.any())
            refit(rounded, values, scale, least, group, below, above, lowest, with_least, outside)
            if not np.array_equal(before, outside):
                columns_outside = _columns_again(columns_outside, before, outside, group)
        found.by_row[part] = outside.sum(axis=1)
        found.by_column += columns_outside
        found.note(part, outside)
    return found.measured(rule, rounding)


def _columns_again(
    columns: Counts,
    before: npt.NDArray[np.int32],
    after: npt.NDArray[np.int32],
    group: int,
) -> Counts:
    """Counts of columns, lessened by the share of their groups' weights that were forgiven."""
    had, left = before.sum(axis=0), after.sum(axis=0)
    share = np.divide(left, had, out=np.zeros(len(had)), where=had > 0)
    again: Counts = np.rint(columns * np.repeat(share, group)).astype(np.int64)
    return again
