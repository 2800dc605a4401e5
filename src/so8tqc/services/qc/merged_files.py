"""What was merged instead into the tensors of a GGUF, where the reference has adapters.

The converter's history is repeated on what each known mistake makes of the base, so that a mistake
is looked for in the file's own layout: stacked experts, joined projections, reordered rows. A
mistake is named where it explains a tensor as well as its type stores anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from so8tqc.adapters.changed import AdapterPatch, Changed, logical
from so8tqc.adapters.plan import AdapterPlan
from so8tqc.adapters.steps import Step
from so8tqc.checkpoints.safetensors_index import ITEM_BYTES, torch_dtype
from so8tqc.errors import So8tqcError, ToolError
from so8tqc.gguf.conversion import UntraceableError
from so8tqc.gguf.file import GGUFFile, GGUFTensor
from so8tqc.llama.ggml import encode
from so8tqc.record_kinds.tensors import TensorRow
from so8tqc.records import Diagnosis
from so8tqc.rotations.algebra import ulp
from so8tqc.services.tensors.expected import Expected
from so8tqc.services.tensors.measure import PLAIN, as_matrix, dequantized, stored_rows
from so8tqc.services.tensors.service import wrong_of
from so8tqc.services.weights.gguf import error_limit
from so8tqc.services.weights.merges import (
    SAMPLE_ELEMENTS,
    Guess,
    MergeFinding,
    Mistakes,
    nearest_mistake,
    scaled,
    scaled_step,
    summarise_merges,
)

if TYPE_CHECKING:
    import torch

_ONE_BIT = 2.0
"""Times the error of ggml's own encoder: what one bit less costs."""

_ROUNDINGS = 3.0
"""Times the error of one rounding: an honest file may have been through two."""

Other = tuple[Step, ...]


def diagnose_merged_file(
    rows: Sequence[TensorRow],
    gguf: GGUFFile,
    expected: Expected,
    plan: AdapterPlan,
    subject: str,
) -> tuple[list[Diagnosis], set[str]]:
    """Explain tensors that are not what the adapters make of the base.

    Args:
        rows: of the judged tensors.
        gguf: the file.
        expected: what it must stand for.
        plan: what the adapters change.
        subject: the file's name, for the text.

    Returns:
        One diagnosis for each code, and the names of the tensors that are explained.
    """
    changed = {one.entry.name: one for one in plan.changed}
    mistakes = Mistakes(plan)
    found: dict[str, MergeFinding] = {}
    for row in wrong_of(rows):
        ours = [changed[source] for source in row.source if source in changed]
        if not ours:
            continue
        case = _Case(gguf.tensors[row.name], expected, tuple(ours), mistakes)
        if (told := case.explained()) is not None:
            found[row.name] = MergeFinding(row.layer, *told)
    targets = sum(any(source in changed for source in row.source) for row in rows)
    return summarise_merges(list(found.values()), targets, subject), set(found)


@dataclass(frozen=True)
class _Case:
    """One tensor of the file that is made of changed ones."""

    tensor: GGUFTensor
    expected: Expected
    changed: tuple[Changed, ...]
    mistakes: Mistakes

    def explained(self) -> tuple[str, str] | None:
        """Code and note of what was merged instead; None: nothing known explains the tensor."""
        try:
            right = self._sample(self.expected)
            guesses = list(self._guesses(right))
        except (UntraceableError, ValueError):
            return None
        rounding = self._rounding(right)
        return nearest_mistake(self._stored, right, guesses, rounding, self._limit)

    def _guesses(self, right: torch.Tensor) -> Iterator[Guess]:
        base = self._sample(self.expected, baked=False)
        yield Guess("not_baked", "the base weight stands here", base)
        tables = [self._others(one) for one in self.changed]
        shared = [key for key in tables[0] if all(key in table for table in tables)]
        for code, note in shared:
            others = [table[code, note] for table in tables]
            try:
                yield Guess(code, note, self._sample(self._with(others)))
            except So8tqcError:  # the mistake would have overflowed
                continue
        found = [scaled_step(part.steps) for one in self.changed for part in one.parts]
        steps = [step for _, step in found if step is not None]
        if found and len(steps) == len(found):
            without = self._sample(self._with([_without_sum(one) for one in self.changed]))
            if (guess := scaled(self._stored, right, without, steps[0])) is not None:
                yield guess

    def _others(self, changed: Changed) -> dict[tuple[str, str], Changed]:
        """(code, note) → the tensor with that mistake in all of its logical weights."""
        values = changed.values()
        by_part: list[Mapping[tuple[str, str], Other]] = []
        for part in changed.parts:
            made = self.mistakes.of(changed, part, logical(values, part))
            by_part.append({(code, note): steps for code, note, steps in made})
        if not by_part:
            return {}
        return {
            key: _with_steps(changed, [table[key] for table in by_part])
            for key in by_part[0]
            if all(key in table for table in by_part)
        }

    def _with(self, others: Sequence[Changed]) -> Expected:
        """What the file would stand for if these tensors were changed otherwise."""
        patches = dict(self.expected.patches)
        for other in others:
            patches[other.entry.name] = partial(_patch, other)
        return replace(self.expected, patches=patches)

    def _sample(self, expected: Expected, *, baked: bool = True) -> torch.Tensor:
        import torch

        values = as_matrix(expected.values(self.tensor.name, baked=baked), self.tensor)
        return torch.from_numpy(values[self._rows].astype(np.float64))

    @property
    def _stored(self) -> torch.Tensor:
        import torch

        columns = self.tensor.shape[-1]
        raw = stored_rows(self.tensor, self._rows)
        return torch.from_numpy(dequantized(raw, self.tensor.type, columns).astype(np.float64))

    @property
    def _rows(self) -> np.ndarray[tuple[int, ...], np.dtype[np.intp]]:
        """Evenly spread."""
        rows = self.tensor.elements // self.tensor.shape[-1]
        count = min(rows, max(1, SAMPLE_ELEMENTS // self.tensor.shape[-1]))
        return np.unique(np.linspace(0, rows - 1, count).astype(np.intp))

    def _rounding(self, values: torch.Tensor) -> float:
        """Norm of the error of one rounding, to what a bake stores or to the file's plain type."""
        types = {self.changed[0].dtype, self.tensor.type} & ITEM_BYTES.keys()
        norms = [float(ulp(values, torch_dtype(type_)).norm()) for type_ in types]
        return max(norms) / 12**0.5

    def _limit(self, values: torch.Tensor) -> float:
        """Norm of the error up to which these values explain what the file stores."""
        rounding = _ROUNDINGS * self._rounding(values)
        if self.tensor.type in PLAIN:
            return rounding
        plain = np.ascontiguousarray(values.numpy().astype(np.float32))
        try:
            codes = encode(plain, self.tensor.type)
        except (ToolError, KeyError):
            return error_limit(self.tensor.type) * float(values.norm())
        error = dequantized(codes, self.tensor.type, plain.shape[1]).astype(np.float64) - plain
        return max(rounding, _ONE_BIT * float(np.linalg.norm(error)))


def _patch(changed: Changed, _dtype: str) -> AdapterPatch:
    return AdapterPatch(changed)


def _with_steps(changed: Changed, steps: Sequence[Other]) -> Changed:
    parts = [replace(part, steps=its) for part, its in zip(changed.parts, steps, strict=True)]
    return replace(changed, parts=tuple(parts))


def _without_sum(changed: Changed) -> Changed:
    """The tensor without the first s·B·A of each logical weight."""

    def rest(steps: Other) -> Other:
        at, _ = scaled_step(steps)
        return (*steps[:at], *steps[at + 1 :])

    return _with_steps(changed, [rest(part.steps) for part in changed.parts])
