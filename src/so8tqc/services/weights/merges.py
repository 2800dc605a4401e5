"""A merge that others made: what was done instead, from the weights alone.

Each known mistake predicts a weight. Under rounding noise the true prediction is the nearest (see
``rotations.hypotheses``); the right one is preferred among those that the noise does not tell apart
from the nearest. Where the right value is the nearest but not what is stored, the arithmetic is
asked for: PEFT merges in the dtype in which the model was loaded, which is simulated bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from so8tqc.adapters.changed import Changed, Part, logical, row_chunks
from so8tqc.adapters.files import AdapterFiles, array
from so8tqc.adapters.methods.orthogonal import reflections, span_reflection
from so8tqc.adapters.names import StoredNames
from so8tqc.adapters.plan import AdapterPlan
from so8tqc.adapters.steps import (
    AddLowRank,
    BlockColumns,
    BlockRows,
    MixRowPairs,
    NormalisedAdd,
    ReplaceRows,
    ScaleRows,
    Step,
    Steps,
    SubtractProjection,
)
from so8tqc.check_guide import REBAKE
from so8tqc.checkpoints.patch import tensor_view
from so8tqc.checkpoints.safetensors_index import Checkpoint
from so8tqc.errors import So8tqcError
from so8tqc.records import Diagnosis
from so8tqc.rotations.algebra import ulp
from so8tqc.rotations.files.peft_oft import oft_blocks
from so8tqc.rotations.hypotheses import SEPARABLE
from so8tqc.services.weights.adapters import AdapterAlgebra
from so8tqc.services.weights.quantizers import dequantized
from so8tqc.services.weights.structure import EFFECT_SHARE, EXACT_LIMIT_ULP, effect_share

if TYPE_CHECKING:
    import torch

SAMPLE_ELEMENTS = 1 << 17
"""Of the leading rows, on which hypotheses are ranked."""

_MATCHING = 0.999
"""Share of elements that a simulated merge must give exactly."""

_FLOAT32 = 32 * 2.0**-24
"""Roundings of a merge in float32, relative to |W| + |Δ| of the row, generously."""

_HALVED = 0.5
"""What explains a weight leaves at most so much of the error that the right value leaves."""

_NAMED_SCALES = 0.02
"""A factor this near to a known ratio has its name."""
_NOTES = 3


class Mistake(NamedTuple):
    """What may have been done in the place of the right steps.

    Attributes:
        code: of the diagnosis.
        note: for people.
        steps: those that were done.
    """

    code: str
    note: str
    steps: tuple[Step, ...]


class Guess(NamedTuple):
    """What may have been stored.

    Attributes:
        code: of the diagnosis.
        note: for people.
        values: W̃ in float64, some rows of it.
    """

    code: str
    note: str
    values: torch.Tensor


@dataclass(frozen=True)
class MergeFinding:
    """What one tensor looks like."""

    layer: int | None
    code: str
    note: str


@dataclass(frozen=True)
class _Case:
    """One logical weight under examination."""

    changed: Changed
    part: Part
    base: torch.Tensor
    stored: torch.Tensor

    @property
    def rows(self) -> slice:
        """The sample."""
        multiple = Steps(self.part.steps).row_multiple
        count = max(1, SAMPLE_ELEMENTS // (multiple * max(1, self.base.shape[1]))) * multiple
        return slice(0, min(count, self.base.shape[0]))

    def after(self, steps: Sequence[Step], base: torch.Tensor | None = None) -> torch.Tensor:
        """The sample of W̃ of other steps on the stored base, or on another one."""
        on = self.base if base is None else base
        return Steps(tuple(steps)).apply(self.rows, on).value


def diagnose_merge(
    results: Sequence[AdapterAlgebra], baked: Checkpoint, plan: AdapterPlan, model: str
) -> list[Diagnosis]:
    """Explain every changed tensor that is not the exact value, or does not show the adapter.

    Args:
        results: the comparison of the candidate's tensors.
        baked: the candidate.
        plan: what should have been stored.
        model: the candidate's name, for the text.

    Returns:
        One diagnosis for each code found, with the layers it concerns.
    """
    mistakes = Mistakes(plan)
    found: list[MergeFinding] = []
    for result in results:
        comparison, changed = result.comparison, result.changed
        if comparison.non_finite:
            note = f"{comparison.non_finite} NaN or infinite elements"
            found.append(MergeFinding(changed.layer, "non_finite", note))
        elif comparison.max_ulp > EXACT_LIMIT_ULP:
            stored = tensor_view(baked.tensors[changed.entry.name])
            found.append(_examine(changed, stored, mistakes))
        elif effect_share(comparison) < EFFECT_SHARE:
            found.append(
                MergeFinding(changed.layer, "storage_rounding", "the change is below rounding")
            )
    return summarise_merges(found, len(results), model)


def _examine(changed: Changed, stored: torch.Tensor, mistakes: Mistakes) -> MergeFinding:
    """What was stored instead; the first of a tensor's logical weights that is wrong says it."""
    if not changed.parts:
        return _whole(changed, stored)
    told: MergeFinding | None = None
    for part in changed.parts:
        base = logical(changed.values(tensor_view(changed.entry)), part)
        case = _Case(changed, part, base, logical(stored, part))
        found = _nearest(case, list(_guesses(case, mistakes)))
        if found is not None:
            return found
        told = told or _arithmetic(case)
    return told or MergeFinding(changed.layer, "foreign_edit", f"{changed.entry.name} was edited")


def _whole(changed: Changed, stored: torch.Tensor) -> MergeFinding:
    """A saved module: the base's own values, or something else."""
    base = tensor_view(changed.entry)
    if bool((stored.double() == base.double()).all()):
        note = f"{changed.entry.name}, which the adapter saves, is the base's"
        return MergeFinding(changed.layer, "not_baked", note)
    return MergeFinding(changed.layer, "foreign_edit", f"{changed.entry.name} was edited")


def _nearest(case: _Case, guesses: Sequence[Guess]) -> MergeFinding | None:
    """The mistake that explains the sample; None: the right value is as near, or nothing does."""
    w = case.stored[case.rows].double()
    right = case.after(case.part.steps)
    rounding = float(ulp(right, case.stored.dtype).norm()) / 12**0.5
    limit = max(3 * rounding, _HALVED * float((w - right).norm()))
    told = nearest_mistake(w, right, guesses, rounding, lambda _: limit)
    return None if told is None else MergeFinding(case.changed.layer, *told)


def nearest_mistake(
    stored: torch.Tensor,
    right: torch.Tensor,
    guesses: Sequence[Guess],
    rounding: float,
    limit: Callable[[torch.Tensor], float],
) -> tuple[str, str] | None:
    """Code and note of the mistake that explains some rows.

    Args:
        stored: the rows, float64.
        right: what they should be.
        guesses: what they may be; what has a free parameter comes last.
        rounding: norm of the error that right storing makes.
        limit: what a guess says → norm of the error up to which it explains the rows.

    Returns:
        None: the right value is as near, or nothing explains them.
    """
    if not guesses:
        return None
    error = float((stored - right).norm())
    errors = [float((stored - guess.values).norm()) for guess in guesses]
    nearest = int(np.argmin(errors))
    reach = SEPARABLE * max(errors[nearest], rounding) / stored.numel() ** 0.5

    def alike(values: torch.Tensor) -> bool:
        return bool(float((values - guesses[nearest].values).norm()) <= reach)

    if error <= errors[nearest] or alike(right):
        return None
    # what has a free parameter always fits a little better: the first that is as near is told
    near = [(e, guess) for e, guess in zip(errors, guesses, strict=True) if alike(guess.values)]
    off, best = near[0]
    if off > limit(best.values):
        return None
    rivals = [guess.note for _, guess in near if guess.code != best.code]
    if not rivals:
        return best.code, best.note
    listed = ", ".join(rivals[:_NOTES])
    return best.code, f"{best.note}; the storage cannot tell it from: {listed}"


class Mistakes:
    """What may have been done instead, of every weight that a plan changes."""

    def __init__(self, plan: AdapterPlan) -> None:
        self._others = _steps_by_kind(plan)
        self._turned = _other_directions(plan)

    def of(self, changed: Changed, part: Part, base: torch.Tensor) -> Iterator[Mistake]:
        """Of one logical weight.

        Args:
            changed: its tensor.
            part: the weight in it.
            base: the weight as stored, [out, in].
        """
        steps, name = part.steps, changed.entry.name
        yield Mistake("double_baked", "the adapter was applied twice", (*steps, *steps))
        for i, step in enumerate(steps):
            for code, note, other in _alternatives(step, base):
                yield Mistake(code, note, (*steps[:i], *other, *steps[i + 1 :]))
        yield from _partial(steps)
        for note, other in self._turned.get(name, ()):
            yield Mistake("wrong_direction", note, other)
        for other_name, other in self._others.get(_kind(name), {}).items():
            if other_name != name and _fits(other, steps):
                note = f"what was trained for {other_name} stands here"
                yield Mistake("layers_permuted", note, other)


def _guesses(case: _Case, mistakes: Mistakes) -> Iterator[Guess]:
    own = case.base
    if case.changed.source is not None:
        own = logical(tensor_view(case.changed.entry), case.part)
    yield Guess("not_baked", "the base weight stands here", case.after((), own))
    for code, note, steps in mistakes.of(case.changed, case.part, case.base):
        yield Guess(code, note, case.after(steps))
    yield from _bases(case)
    at, step = scaled_step(case.part.steps)
    if step is None:
        return
    without = case.after((*case.part.steps[:at], *case.part.steps[at + 1 :]))
    right = case.after(case.part.steps)
    if (found := scaled(case.stored[case.rows].double(), right, without, step)) is not None:
        yield found


def _alternatives(step: Step, base: torch.Tensor) -> Iterator[tuple[str, str, tuple[Step, ...]]]:
    """Other things that may have been done in the place of one step.

    Args:
        step: of the right value.
        base: the weight as stored, [out, in].
    """
    if isinstance(step, AddLowRank) and step.shape[0] == step.shape[1]:
        flipped = AddLowRank(
            np.ascontiguousarray(step.right.T), np.ascontiguousarray(step.left.T), step.scale
        )
        yield "transposed", "s·(B·A)ᵀ was added", (flipped,)
    if isinstance(step, NormalisedAdd):
        yield "dora_norms", "W + s·B·A without DoRA's magnitudes and norms", (step.branch,)
        yield (
            "dora_norms",
            "the norms are those of W alone, not of W + s·B·A",
            (step.branch, _over_base_norm(step, base)),
        )
        yield (
            "dora_norms",
            "multiplied by the magnitudes, not divided by the norms",
            (step.branch, ScaleRows(step.magnitude)),
        )
    if isinstance(step, (BlockColumns, BlockRows)):
        flipped_blocks = np.ascontiguousarray(step.blocks.transpose(0, 2, 1))
        yield "transposed", "the transposed rotation", (replace(step, blocks=flipped_blocks),)
    if isinstance(step, SubtractProjection):
        yield (
            "transposed",
            "the reflections in reverse order",
            (SubtractProjection(step.z, step.v),),
        )
        for note, other in (("with", span_reflection), ("without", reflections)):
            if (made := other(step.z)) is not None and not np.allclose(made.v, step.v):
                yield "wrong_parametrization", f"HRA {note} Gram–Schmidt", (made,)
    if isinstance(step, MixRowPairs):
        yield "transposed", "the angles with the other sign", (replace(step, other=-step.other),)


def _over_base_norm(step: NormalisedAdd, base: torch.Tensor) -> ScaleRows:
    """m/‖W⁰‖ times a row: what DoRA does if the norm forgets the branch."""
    import torch

    norms = torch.linalg.vector_norm(base, dim=1, dtype=torch.float64)
    return ScaleRows(step.magnitude / norms.numpy())


def scaled_step(steps: Sequence[Step]) -> tuple[int, AddLowRank | None]:
    """The first s·B·A among steps, and its place; None: there is none."""
    for at, step in enumerate(steps):
        if isinstance(step, AddLowRank):
            return at, step
    return 0, None


def scaled(
    stored: torch.Tensor, right: torch.Tensor, without: torch.Tensor, step: AddLowRank
) -> Guess | None:
    """The strength of s·B·A that fits some rows best, if it is neither 0 nor 1.

    Args:
        stored: the rows, float64.
        right: what they should be.
        without: what they would be without the step.
        step: s·B·A.
    """
    delta = right - without
    square = float(delta.square().sum())
    if not square:
        return None
    factor = float(((stored - without) * delta).sum()) / square
    if abs(factor) < 0.02 or abs(factor - 1) < 0.002:
        return None
    return Guess("wrong_scale", _scale_note(step, factor), without + factor * delta)


def _scale_note(step: AddLowRank, factor: float) -> str:
    rank = step.rank
    known = {
        "twice": 2.0,
        "with the opposite sign": -1.0,
        "alpha/√r in the place of alpha/r": rank**0.5,
        "alpha/r in the place of alpha/√r": rank**-0.5,
        "without its scale (s = 1)": 1 / step.scale if step.scale else 0.0,
        "alpha in the place of alpha/r": float(rank),
        "the scale applied twice": step.scale,
    }
    names = [n for n, ratio in known.items() if abs(factor - ratio) < _NAMED_SCALES * abs(ratio)]
    what = f": {' or '.join(names)}" if names else ""
    return f"s·B·A was added {factor:.3g} times as strongly as trained{what}"


def _partial(steps: tuple[Step, ...]) -> Iterator[Mistake]:
    """Some of several steps, or all in another order."""
    if len(steps) < 2:
        return
    for i, step in enumerate(steps):
        rest = (*steps[:i], *steps[i + 1 :])
        note = f"{_step_name(step)} is missing, the rest is there"
        yield Mistake("part_missing", note, rest)
    yield Mistake("wrong_order", "the steps in the reverse order", steps[::-1])


def _step_name(step: Step) -> str:
    names: tuple[tuple[type, str], ...] = (
        (AddLowRank, "s·B·A"),
        (NormalisedAdd, "the DoRA branch"),
        (BlockColumns, "the rotation of the input"),
        (BlockRows, "the rotation of the output"),
        (ScaleRows, "the scale of the rows"),
        (SubtractProjection, "the reflections"),
        (MixRowPairs, "the rotation of output pairs"),
        (ReplaceRows, "the trained rows"),
    )
    return next((name for kind, name in names if isinstance(step, kind)), "a step")


def _bases(case: _Case) -> Iterator[Guess]:
    """The right steps on another base: quantized and back, or rounded."""
    import torch

    if case.part.transposed or case.part.expert is not None or case.base.ndim != 2:
        return
    rows = case.rows
    part = case.base[rows].float()
    for name, values in dequantized(part):
        note = f"the adapter was merged into a base that had been quantized ({name}) and back"
        yield Guess("quantized_base", note, case.after(case.part.steps, values))
    for dtype in ("bfloat16", "float16"):
        coarse = part.to(getattr(torch, dtype)).float()
        if not torch.equal(coarse, part):
            note = f"the base was rounded to {dtype} before the merge"
            yield Guess("coarse_merge", note, case.after(case.part.steps, coarse))


def _arithmetic(case: _Case) -> MergeFinding | None:
    """In which arithmetic the right merge gives these numbers; None: in none."""
    rows = case.rows
    w = case.stored[rows]
    for note, simulated in _simulated(case, rows):
        if float(simulated.eq(w).double().mean()) >= _MATCHING:
            return MergeFinding(case.changed.layer, "coarse_merge", note)
    if not _within_float32(case):
        return None
    note = "the right value, computed in float32"
    return MergeFinding(case.changed.layer, "storage_rounding", note)


def _simulated(case: _Case, rows: slice) -> Iterator[tuple[str, torch.Tensor]]:
    """What PEFT's merge in a 16-bit dtype makes, bit by bit."""
    import torch

    steps = case.part.steps
    if len(steps) != 1 or not isinstance(steps[0], (AddLowRank, NormalisedAdd)):
        return
    step = steps[0]
    branch = step.branch if isinstance(step, NormalisedAdd) else step
    left = torch.from_numpy(np.ascontiguousarray(branch.left[rows])).float()
    right = torch.from_numpy(branch.right).float()
    for name in ("bfloat16", "float16"):
        dtype = getattr(torch, name)
        base = case.base[rows].to(dtype)
        for adapter, a, b in (
            ("", left, right),
            (", the adapter too", left.to(dtype).float(), right.to(dtype).float()),
        ):
            delta = ((a @ b) * branch.scale).to(dtype)
            merged = base + delta
            if isinstance(step, NormalisedAdd):
                norm = torch.linalg.norm(merged, dim=1)
                magnitude = torch.from_numpy(step.magnitude[rows]).to(dtype)
                merged = (magnitude / norm)[:, None] * merged
            note = f"merged in {name}: s·B·A was rounded to {name}{adapter} before it was added"
            yield note, merged.to(case.stored.dtype)


def _within_float32(case: _Case) -> bool:
    for rows in row_chunks(case.base, Steps(case.part.steps)):
        exact = Steps(case.part.steps).apply(rows, case.base).value
        size = exact.abs().amax(dim=1, keepdim=True) + case.base[rows].double().abs().amax(
            dim=1, keepdim=True
        )
        error = (case.stored[rows].double() - exact).abs()
        if bool((error > ulp(exact, case.stored.dtype) / 2 + _FLOAT32 * size).any()):
            return False
    return True


def _kind(name: str) -> str:
    """A tensor's name without numbers: those of one kind may be confused."""
    return ".".join("#" if word.isdigit() else word for word in name.split("."))


def _steps_by_kind(plan: AdapterPlan) -> dict[str, dict[str, tuple[Step, ...]]]:
    found: dict[str, dict[str, tuple[Step, ...]]] = {}
    for changed in plan.changed:
        if len(changed.parts) == 1 and changed.parts[0].expert is None:
            steps = found.setdefault(_kind(changed.entry.name), {})
            steps[changed.entry.name] = changed.parts[0].steps
    return found


def _fits(steps: Sequence[Step], own: Sequence[Step]) -> bool:
    if len(steps) != len(own):
        return False
    return all(type(a) is type(b) for a, b in zip(steps, own, strict=True))


def _other_directions(plan: AdapterPlan) -> dict[str, list[tuple[str, tuple[Step, ...]]]]:
    """Tensor → OFT's R by the other transform, or by the series of older versions.

    The exact Cayley transform and the truncated series turn in opposite directions.
    """
    found: dict[str, list[tuple[str, tuple[Step, ...]]]] = {}
    by_name = {c.entry.name: c for c in plan.changed}
    ofts = [files for files in plan.adapters if files.kind == "OFT"]
    if len(ofts) != 1 or not by_name:
        return found
    names = StoredNames(plan.checkpoint)
    for module, parts in ofts[0].parts.items():
        entry = names.find(f"{module}.weight")
        changed = by_name.get(entry.name) if entry is not None else None
        if changed is None or len(changed.parts) != 1:
            continue
        (part,) = changed.parts
        at = next((i for i, s in enumerate(part.steps) if isinstance(s, BlockColumns)), None)
        if at is None:
            continue
        for note, blocks in _other_blocks(ofts[0], parts["oft_R.weight"]):
            step = part.steps[at]
            assert isinstance(step, BlockColumns)
            if blocks.shape == step.blocks.shape:
                turned = BlockColumns(np.ascontiguousarray(blocks.transpose(0, 2, 1)))
                steps = (*part.steps[:at], turned, *part.steps[at + 1 :])
                found.setdefault(changed.entry.name, []).append((note, steps))
    return found


def _other_blocks(
    files: AdapterFiles, vector: torch.Tensor
) -> Iterator[tuple[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]]:
    series = bool(files.config.get("use_cayley_neumann", True))
    which = "the exact Cayley transform" if series else "the truncated Cayley–Neumann series"
    variants: list[tuple[str, dict[str, object]]] = [
        (f"{which}, which turns the other way", {"use_cayley_neumann": not series})
    ]
    if series:
        old = {"use_cayley_neumann": True, "peft_version": "0.17.0"}
        variants.append(("the series of PEFT before 0.18, with twice its last power", old))
    for note, change in variants:
        config = {**files.config, **change}
        try:
            yield note, oft_blocks(config, array(vector), files.directory, str(files.directory))
        except So8tqcError:
            continue


_TEXTS = {
    "not_baked": ("The adapter was never merged", REBAKE),
    "layer_missing": ("The adapter was not merged in some layers", REBAKE),
    "double_baked": ("The adapter was merged twice", REBAKE + " (from the unmerged base)."),
    "wrong_scale": ("The adapter was merged with another scale", REBAKE),
    "transposed": ("The transposed change was merged", REBAKE),
    "wrong_direction": ("OFT's rotation was made by another transform", REBAKE),
    "wrong_parametrization": ("The reflections were combined in another way", REBAKE),
    "dora_norms": ("DoRA was merged without its norms", REBAKE),
    "coarse_merge": ("The adapter was merged in 16-bit arithmetic", REBAKE),
    "quantized_base": (
        "The adapter was merged into a dequantized base",
        REBAKE + " (from the full-precision base).",
    ),
    "layers_permuted": ("Layers were interchanged", REBAKE),
    "part_missing": ("A part of what was trained is missing", REBAKE),
    "wrong_order": ("What was trained was applied in another order", REBAKE),
    "foreign_edit": ("Something else was changed", REBAKE),
    "non_finite": ("There are NaN or infinite values", REBAKE + " --baked-dtype float32"),
    "storage_rounding": (
        "The right merge, with more rounding than an exact one",
        REBAKE + " --baked-dtype float32",
    ),
}


def summarise_merges(found: Sequence[MergeFinding], targets: int, model: str) -> list[Diagnosis]:
    """One diagnosis for each code, the first found first."""
    told = []
    for code in dict.fromkeys(f.code for f in found):
        concerned = [f for f in found if f.code == code]
        layers = tuple(sorted({f.layer for f in concerned if f.layer is not None}))
        known = "layer_missing" if code == "not_baked" and len(concerned) < targets else code
        text, remedy = _TEXTS[known]
        notes = "; ".join(list(dict.fromkeys(f.note for f in concerned))[:_NOTES])
        where = f"{len(concerned)} of {targets} tensors of {model}"
        text = f"{text}: {notes} ({where})."
        told.append(Diagnosis(code=known, layers=layers, text=text, remedy=remedy))
    return told
