"""One tensor: measured under every rounding that it may have gone through, judged, explained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from so8tqc.errors import So8tqcError, ToolError
from so8tqc.gguf.conversion import UntraceableError
from so8tqc.gguf.file import GGUFFile, GGUFTensor
from so8tqc.gguf.tensor_map import FloatArray
from so8tqc.llama.ggml import encode
from so8tqc.record_kinds.tensors import TensorRow, TensorVerdict
from so8tqc.services.tensors.expected import KEEP, Expected
from so8tqc.services.tensors.hypotheses import (
    Guess,
    Rows,
    best,
    coarser_sources,
    nearest_rows,
    reordered,
    sample_of,
    scaled,
    shifted,
    with_tool,
)
from so8tqc.services.tensors.measure import (
    INTEGERS,
    PLAIN,
    ROUNDINGS,
    Measured,
    as_matrix,
    dequantized,
    measure,
    stored_rows,
)
from so8tqc.services.tensors.verdict import (
    EITHER_NEIGHBOUR,
    SIGMAS,
    Region,
    correlated,
    region,
    slopes,
)

ONE_BIT = 4.0
"""Of a type's mean square error: what one bit less costs (6.02 dB)."""

_BLOCK = re.compile(r"^blk\.(\d+)\.")
_FEW_ROWS = 16
_ROWS_OF_COLUMNS = 512
_PERHAPS = 2.0
"""σ from which on a small tensor may be compensated: all of a file have to show it together."""
_TELLING = 0.5
"""A slope whose interval is not narrower than this tells nothing of what is left."""
_WORTH_SAYING = 3.0
"""Standard errors from which on a factor is told of weights that are wrong anyway."""
_ALTERNATIVES = ("F32", "F16", "BF16")

_FACTORS = {"IQ3_XXS": 1.0125, "IQ3_S": 1.033, "IQ2_S": 0.9875, "IQ1_S": 1.125, "IQ1_M": 1.1125}
"""What ggml's encoders multiply the scale with after they have fitted it (``ggml-quants.c``)."""


class Says(NamedTuple):
    """A verdict and what it rests on."""

    verdict: TensorVerdict
    detail: str = ""
    together: float | None = None


@dataclass
class Case:
    """A file and what it must stand for.

    Attributes:
        gguf: the file.
        expected: its weights.
        samples: tensor → a few rows of its expected weights, for comparison with other tensors.
    """

    gguf: GGUFFile
    expected: Expected
    samples: dict[str, FloatArray] = field(default_factory=dict)

    def sample(self, name: str) -> FloatArray | None:
        """[few, columns] of another tensor; None if its history cannot be replayed."""
        if name not in self.samples:
            try:
                values = as_matrix(self.expected.values(name), self.gguf.tensors[name])
            except (UntraceableError, So8tqcError, ValueError):
                return None
            self.samples[name] = values[few(len(values))].copy()
        return self.samples[name]

    def like(self, name: str) -> list[str]:
        """Tensors of the same shape, those of the same kind and of the same layer first."""
        shape = self.gguf.tensors[name].shape
        role, layer = _BLOCK.sub("", name), layer_of(name)
        others = [
            other
            for other, tensor in self.gguf.tensors.items()
            if other != name and tensor.shape == shape and other in self.expected.sources
        ]
        return sorted(others, key=lambda o: (_BLOCK.sub("", o) != role, layer_of(o) != layer))


def layer_of(name: str) -> int | None:
    """``blk.7.attn_q.weight`` → 7."""
    block = _BLOCK.match(name)
    return int(block[1]) if block else None


def few(rows: int) -> Rows:
    """A few rows, evenly spread: the same of every tensor of a height."""
    return np.unique(np.linspace(0, rows - 1, min(rows, _FEW_ROWS)).astype(np.intp))


def judge_tensor(case: Case, name: str) -> TensorRow:
    """What one tensor of the file is."""
    tensor = case.gguf.tensors[name]
    row = TensorRow(
        name=name,
        source=case.expected.sources.get(name, ()),
        layer=layer_of(name),
        type=tensor.type,
        elements=tensor.elements,
        bits=8.0 * tensor.bytes / max(tensor.elements, 1),
        verdict="not looked at",
    )
    try:
        values = case.expected.values(name)
    except UntraceableError as reason:
        return row.model_copy(update={"detail": str(reason)})
    if _without_ones(values.shape) != _without_ones(tensor.shape):
        words = f"it has shape {list(tensor.shape)}, where its source gives {list(values.shape)}"
        return row.model_copy(update={"verdict": "unexplained", "detail": words})
    if tensor.type in INTEGERS:
        same = np.array_equal(values.reshape(-1), tensor.data.reshape(-1).astype(np.float32))
        return row.model_copy(
            update={"verdict": "exact"}
            if same
            else {"verdict": "edited", "detail": "its integers are others"}
        )
    matrix = as_matrix(values, tensor)
    matrix, found = _nearest_rounding(case, name, matrix)
    over_plain, is_plain = _beside_plain(tensor, matrix, found)
    says = _says(case, name, matrix, found, over_plain, is_plain)
    return row.model_copy(
        update={
            "verdict": says.verdict,
            "detail": says.detail,
            "together": says.together,
            "error": found.error,
            "over_grid": found.over_grid,
            "over_plain": over_plain,
            "outside": found.outside if found.rule or tensor.type in PLAIN else None,
            "shows": found.shows,
        }
    )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _nearest_rounding(case: Case, name: str, matrix: FloatArray) -> tuple[FloatArray, Measured]:
    """The weights, as the bake and the file between stored them, that explain the tensor best."""
    tensor = case.gguf.tensors[name]
    found = measure(tensor, matrix)
    if not found.outside or found.non_finite:
        return matrix, found
    rows = sample_of(found)
    dtypes = (KEEP, *_ALTERNATIVES) if case.expected.is_changed(name) else (KEEP,)
    for dtype in dtypes:
        try:
            other = matrix if dtype == KEEP else as_matrix(
                case.expected.values(name, dtype=dtype), tensor
            )  # fmt: skip
        except So8tqcError:  # a fold that the dtype cannot hold
            continue
        few_of = np.ascontiguousarray(other[rows])
        for rounding in ROUNDINGS:
            if measure(tensor, few_of, rounding, rows).outside < int(found.by_row[rows].sum()):
                again = measure(tensor, other, rounding)
                if again.outside < found.outside:
                    matrix, found = other, again
                if not found.outside:
                    return matrix, found
    return matrix, found


def _beside_plain(
    tensor: GGUFTensor, matrix: FloatArray, found: Measured
) -> tuple[float | None, bool | None]:
    """The error over that of ggml's plain encoder, on a few rows; whether the bytes are its own."""
    if tensor.type in PLAIN or found.non_finite:
        return None, None
    rows = few(len(matrix))
    values = np.ascontiguousarray(found.rounding.apply(np.ascontiguousarray(matrix[rows])))
    try:
        plain = encode(values, tensor.type)
    except (ToolError, KeyError):
        return None, None
    stored = stored_rows(tensor, rows)
    errors = [
        float(((dequantized(one, tensor.type, values.shape[1]) - values).astype(float) ** 2).sum())
        for one in (stored, plain)
    ]
    ratio = errors[0] / errors[1] if errors[1] > 0 else (1.0 if errors[0] == 0 else np.inf)
    return ratio, bool(np.array_equal(stored, plain))


def _says(  # noqa: PLR0911  a verdict each
    case: Case,
    name: str,
    matrix: FloatArray,
    found: Measured,
    over_plain: float | None,
    is_plain: bool | None,
) -> Says:
    tensor = case.gguf.tensors[name]
    if found.non_finite:
        words = f"{found.non_finite} of its weights are NaN or infinite"
        return Says("damaged", words)
    if found.largest == 0 and float(np.abs(matrix).max(initial=0)) > 0:
        return Says("damaged", "all of its weights are 0")
    if found.rule is None and tensor.type not in PLAIN:
        return _by_errors(case, name, matrix, found, over_plain, is_plain)
    if found.outside:
        return _explained(case, name, matrix, found)
    if tensor.type in PLAIN:
        return Says("exact")
    if is_plain is None:
        return Says("nearest")
    if over_plain is not None and over_plain >= ONE_BIT:
        words = (
            f"its codes are the nearest, but its scales lose a whole bit: {over_plain:.1f} times "
            "the plain encoder's mean square error"
        )
        return Says("unexplained", words)
    return Says("plain" if is_plain else "importance")


def _explained(case: Case, name: str, matrix: FloatArray, found: Measured) -> Says:
    """What a tensor is of which weights lie outside their codes' cells."""
    tensor = case.gguf.tensors[name]
    where = region(found)
    rows = sample_of(found)
    if where.kind in ("everywhere", "rows"):
        guesses = _guesses(case, name, matrix, found, rows, where)
        if (told := best(tensor, matrix, found, rows, guesses)) is not None:
            words = _at(where, tensor) + told.guess.words
            if "another order" in words:
                words = _order(tensor, matrix, rows, where)
            return Says(told.guess.verdict, f"{words} ({_count(found)})")  # type: ignore[arg-type]
        if _covers(where, found) and (other := _another_tensor(case, name, found)):
            return Says("other tensor", f"it holds {other} ({_count(found)})")
    if where.kind == "everywhere" and found.rule is not None:
        told_slopes = slopes(found.sums)
        over = found.over_grid or 0.0
        if (
            told_slopes.leans <= SIGMAS
            and over <= EITHER_NEIGHBOUR
            and (sigma := correlated(tensor, matrix, found)) > _PERHAPS
        ):
            words = (
                f"errors of its columns go together ({sigma:.0f} σ): {over:.2f} times the mean "
                "square error of rounding, made up for in the layer's outputs"
            )
            return Says("compensated", words, sigma)
    sums = _sums_within(tensor, matrix, found, where)
    if _covers(where, found) and _unrelated(sums):
        words = "it holds weights of another model, unrelated to the expected ones"
        return Says("other tensor", f"{words} ({_count(found)})")
    change = _change(sums)
    return Says("edited", f"{_at(where, tensor)}{change} ({_count(found)})")


def _guesses(
    case: Case, name: str, matrix: FloatArray, found: Measured, rows: Rows, where: Region
) -> Iterator[Guess]:
    if case.expected.is_changed(name):

        def base(its: Rows) -> FloatArray:
            return as_matrix(case.expected.values(name, baked=False), case.gguf.tensors[name])[its]

        yield Guess("other tensor", "the base's weights, which no bake has changed", base)
    if "norm" in name and found.rule is None:
        yield from shifted(matrix)
    if where.kind == "everywhere":
        yield from with_tool(coarser_sources(matrix, case.gguf.tensors[name].type))
    if len(matrix) > 1:
        yield from reordered(case.gguf.tensors[name], matrix)
    yield from scaled(matrix, found, rows)


def _another_tensor(case: Case, name: str, found: Measured) -> str:
    """The tensor of the same shape that is stored in this one's place; "" if none is."""
    tensor = case.gguf.tensors[name]
    rows = few(len(found.by_row))
    limit = int(found.by_row[rows].sum()) // 20
    for other in case.like(name):
        values = case.sample(other)
        if values is not None and measure(tensor, values, found.rounding, rows).outside <= limit:
            return f"the weights of {other}"
    return ""


def _order(tensor: GGUFTensor, matrix: FloatArray, rows: Rows, where: Region) -> str:
    """Which rows stand in whose place, as experts where whole matrices were exchanged."""
    found = nearest_rows(tensor, matrix, rows)
    if len(tensor.shape) == 3 and (found % tensor.shape[1] == rows % tensor.shape[1]).all():
        pairs = dict.fromkeys(
            (int(a) // tensor.shape[1], int(b) // tensor.shape[1])
            for a, b in zip(rows, found, strict=True)
        )
        return "; ".join(f"expert {a} holds the weights of expert {b}" for a, b in pairs)
    shown = ", ".join(
        f"{int(b)} in the place of {int(a)}" for a, b in zip(rows[:3], found, strict=False)
    )
    return f"{_at(where, tensor)}its rows in another order: {shown}"


def _at(where: Region, tensor: GGUFTensor) -> str:
    """``rows 3, 5 of 64: ``; "" for the whole tensor."""
    if where.kind == "everywhere":
        return ""
    between = "," if where.kind == "weights" else " from"
    listed = ", ".join(
        f"row {i[0]}{between} column {i[1]}" if isinstance(i, tuple) else str(i)
        for i in where.first
    )
    more = " …" if where.parts > len(where.first) else ""
    kind = where.kind if where.parts > 1 else where.kind.removesuffix("s")
    columns = tensor.shape[-1]
    sizes = {"rows": f" of {tensor.elements // columns}", "columns": f" of {columns}"}
    size = sizes.get(where.kind, "")
    return f"{kind} {listed}{more}{size}: "


def _sums_within(
    tensor: GGUFTensor, matrix: FloatArray, found: Measured, where: Region
) -> npt.NDArray[np.float64]:
    """[parts, 8] sums over the region alone; of many blocks or columns, over the first."""
    if where.kind == "everywhere":
        return found.sums
    if where.kind == "rows":
        return found.sums[np.flatnonzero(found.by_row)]
    if where.kind in ("columns", "weights"):
        rows = np.flatnonzero(found.by_row)[:_ROWS_OF_COLUMNS]
        within = [(rows, np.flatnonzero(found.by_column)[:_FEW_ROWS])]
    else:
        within = [
            (np.array([row]), np.arange(first, first + found.group))
            for row, first in found.places[:_FEW_ROWS]
        ]
    parts = []
    for rows, columns in within:
        stored = dequantized(stored_rows(tensor, rows), tensor.type, matrix.shape[1])
        x = matrix[np.ix_(rows, columns)].astype(np.float64)
        r = stored[:, columns] - x
        xx, xr, rr = ((a * b).sum(axis=1) for a, b in ((x, x), (x, r), (r, r)))
        none = np.zeros_like(xx)
        parts.append(np.stack([xx, rr, xx, xr, rr, none, none + x.shape[1], none], axis=1))
    return np.concatenate(parts)


def _covers(where: Region, found: Measured) -> bool:
    """Whether the region is most of the tensor."""
    return where.kind == "everywhere" or (
        where.kind == "rows" and 2 * where.parts > len(found.by_row)
    )


def _unrelated(sums: npt.NDArray[np.float64]) -> bool:
    """Whether nothing of the expected weights is left: Σx·q is 0 within its error."""
    both = slopes(sums)
    return len(sums) > 1 and abs(1 + both.on_expected) <= SIGMAS * both.error < _TELLING


def _change(sums: npt.NDArray[np.float64]) -> str:
    """What was done to the weights, as far as it can be measured."""
    both = slopes(sums)
    xx, rr = float(sums[:, 0].sum()), float(sums[:, 1].sum())
    size = f"off by {(rr / xx) ** 0.5:.2%} of their norm" if xx > 0 else "where 0 is expected"
    if both.leans > _WORTH_SAYING:
        middle = 1 + (both.on_expected + both.on_stored) / 2
        return f"weights about {middle:.3f} times the expected, {size}"
    return f"other weights than expected, {size}"


def _count(found: Measured) -> str:
    what = "outside the cells of their codes" if found.rule else "not the expected ones, rounded"
    return f"{found.outside:,} of {found.size:,} weights are {what}"


def _by_errors(
    case: Case,
    name: str,
    matrix: FloatArray,
    found: Measured,
    over_plain: float | None,
    is_plain: bool | None,
) -> Says:
    """Of types whose codes stand for several weights at once: by errors and slopes alone."""
    tensor = case.gguf.tensors[name]
    if is_plain:
        return Says("plain")
    if over_plain is None:
        return Says("not looked at", f"libggml, which encodes {tensor.type}, is not installed")
    told = slopes(found.sums)
    factor = _FACTORS.get(tensor.type, 1.0) - 1
    inside = min(told.on_expected, told.on_expected - factor) <= SIGMAS * told.error and (
        max(told.on_stored, told.on_stored - factor) >= -SIGMAS * told.error
    )
    if over_plain < ONE_BIT and inside:
        return Says("importance")
    guesses: list[tuple[str, FloatArray]] = []
    rows = few(len(matrix))
    if case.expected.is_changed(name):
        base = as_matrix(case.expected.values(name, baked=False), tensor)[rows]
        guesses.append(("the base's weights, which no bake has changed", base))
    for other in case.like(name):
        if (values := case.sample(other)) is not None:
            guesses.append((f"the weights of {other}", values))
    stored = dequantized(stored_rows(tensor, rows), tensor.type, matrix.shape[1])
    own = float(((stored - matrix[rows]) ** 2).sum())
    for words, values in guesses:
        if float(((stored - values) ** 2).sum()) * ONE_BIT < own:
            return Says("other tensor", f"it holds {words}")
    if not inside:
        middle = 1 + (told.on_expected + told.on_stored) / 2
        return Says("edited", f"weights about {middle:.3f} times the expected")
    return Says(
        "unexplained", f"{over_plain:.1f} times the mean square error of {tensor.type}'s encoder"
    )
