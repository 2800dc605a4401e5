"""A stored tensor that adapters change: its logical weights, values and new pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from so8tqc.adapters.names import layer_of
from so8tqc.adapters.rounding import rounded
from so8tqc.adapters.steps import Step, Steps
from so8tqc.checkpoints.patch import tensor_view
from so8tqc.checkpoints.plan import CHUNK_ELEMENTS
from so8tqc.checkpoints.safetensors_index import TensorEntry, torch_dtype
from so8tqc.errors import ShapeError, So8tqcError
from so8tqc.progress import Task
from so8tqc.rotations.fold import to_storage


@dataclass(frozen=True)
class Part:
    """A logical weight [out, in] inside a stored tensor.

    Attributes:
        steps: what makes W' of it.
        expert: index along the first axis of a 3D tensor; None: the tensor is the weight.
        transposed: stored [in, out].
    """

    steps: tuple[Step, ...]
    expert: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Changed:
    """One stored tensor that the adapters change.

    Attributes:
        entry: the tensor in the base.
        dtype: safetensors name of the dtype it will be stored in.
        parts: the logical weights in it that have steps; the others stay as they are.
        source: what stands in the place of the stored values (a saved module); None: they do.
    """

    entry: TensorEntry
    dtype: str
    parts: tuple[Part, ...]
    source: torch.Tensor | None = None

    @property
    def layer(self) -> int | None:
        """Its layer, if its name says one."""
        return layer_of(self.entry.name)

    def values(self, stored: torch.Tensor | None = None) -> torch.Tensor:
        """The stored values, or what stands in their place."""
        if self.source is not None:
            return self.source
        return tensor_view(self.entry) if stored is None else stored

    def chunks(
        self, base: torch.Tensor, stored: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, float, torch.Tensor, torch.Tensor]]:
        """(W' in float64, bound on its error, stored base, ``stored``), some rows at a time.

        Args:
            base: the tensor as the base stores it.
            stored: a candidate's, of the same shape.
        """
        values = self.values(base)
        known = {part.expert: part for part in self.parts}
        experts = range(values.shape[0]) if values.ndim == 3 else (None,)
        for expert in experts:
            part = known.get(expert, Part((), expert))
            steps = Steps(part.steps)
            weight, before, here = (logical(t, part) for t in (values, base, stored))
            for rows in row_chunks(weight, steps):
                done = steps.apply(rows, weight)
                yield done.value, done.error, before[rows].to(torch.float64), here[rows]

    def whole_in_float64(self) -> torch.Tensor:
        """W' in float64, unrounded, in the stored layout."""
        out = self.values().to(torch.float64).clone()
        for part in self.parts:
            weight = logical(self.values(), part)
            value = Steps(part.steps).apply(slice(0, weight.shape[0]), weight)
            logical(out, part).copy_(value.value)
        return out


class AdapterPatch:
    """The new value of one tensor; a ``checkpoints.patch.Patch``."""

    def __init__(self, changed: Changed, task: Task | None = None) -> None:
        self.dtype = changed.dtype
        self._changed = changed
        self._task = task

    def pieces(self, stored: torch.Tensor) -> Iterator[torch.Tensor]:
        """W', some stored rows at a time; a transposed weight at once.

        Raises:
            ModelError: the base tensor holds a NaN or an infinity.
            RotationError: a value overflows the storage dtype, or a norm is zero.
        """
        entry = self._changed.entry
        try:
            for piece in self._pieces(self._changed.values(stored)):
                if self._task is not None:
                    self._task.advance(piece.numel() * piece.element_size(), item=entry.name)
                yield piece.contiguous()
        except So8tqcError as error:
            if error.where is not None:
                raise
            where = f"{entry.file}, {entry.name}"
            raise type(error)(error.what, where=where, remedy=error.remedy) from None

    def _pieces(self, values: torch.Tensor) -> Iterator[torch.Tensor]:
        dtype = torch_dtype(self.dtype)
        if values.ndim == 3:
            known = {part.expert: part for part in self._changed.parts}
            for expert in range(values.shape[0]):
                part = known.get(expert)
                if part is None:
                    yield _copied(values[expert], dtype)
                else:
                    yield from _piecewise(values[expert], part, dtype)
        elif self._changed.parts:
            (part,) = self._changed.parts
            yield from _piecewise(values, part, dtype)
        else:
            yield _copied(values, dtype)


def _piecewise(values: torch.Tensor, part: Part, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    weight = values.T if part.transposed else values
    if values.ndim == 1:
        weight = values[:, None]
    steps = Steps(part.steps)
    chunks = (rounded(steps, weight, rows, dtype) for rows in row_chunks(weight, steps))
    if part.transposed:
        yield torch.cat(list(chunks)).T
    elif values.ndim == 1:
        yield torch.cat(list(chunks))[:, 0]
    else:
        yield from chunks


def row_chunks(weight: torch.Tensor, steps: Steps) -> Iterator[slice]:
    """Rows of a logical weight that are processed together: whole groups of the steps.

    Raises:
        ShapeError: the rows are not whole groups.
    """
    multiple, rows = steps.row_multiple, weight.shape[0]
    if rows % multiple:
        raise ShapeError(f"{rows} rows are no multiple of {multiple}")
    step = multiple * max(1, CHUNK_ELEMENTS // (multiple * max(1, weight.shape[1])))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def _copied(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.clone() if values.dtype == dtype else to_storage(values.double(), dtype)


def logical(values: torch.Tensor, part: Part) -> torch.Tensor:
    """The logical weight [out, in] (a bias: [out, 1]) in a stored tensor; a view."""
    one = values if part.expert is None else values[part.expert]
    if one.ndim == 1:
        return one[:, None]
    return one.T if part.transposed else one
