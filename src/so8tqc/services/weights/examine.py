"""One stored weight under examination: which mistake, or which other map, explains it best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from so8tqc.checkpoints.patch import tensor_view
from so8tqc.checkpoints.plan import PlannedTensor
from so8tqc.rotations.algebra import ulp
from so8tqc.rotations.enums import Parametrization, Site
from so8tqc.rotations.fold import orient, rounded_product
from so8tqc.rotations.hypotheses import (
    PRECISIONS,
    Hypothesis,
    Precision,
    arithmetic_of,
    hypotheses,
    nearest_hypotheses,
    relative_error,
)
from so8tqc.rotations.parametrization import rotation_blocks
from so8tqc.rotations.recover import (
    LinearMaps,
    distances,
    recover_linear_maps,
    recover_rotations,
)
from so8tqc.rotations.rotation_set import FloatArray, RotationSet, Target

if TYPE_CHECKING:
    import torch

Mask = npt.NDArray[np.bool_]

_RESIDUAL_FACTOR = 2.0
"""A linear map explains a block whose residual is at most this many times rounding's: once rounded
values that were then scaled have been rounded twice, and err √2 times as much."""

_SIGNIFICANT = 6.0
"""A recovered map is no rotation if it is this many standard deviations away from one."""

_EDITED = 4.0
"""A row or block whose error is this many times that of the median one was changed."""

_NAMED = 8
_NOTES = 3


@dataclass(frozen=True)
class Finding:
    """What one target's weight looks like."""

    layer: int
    code: str
    note: str


@dataclass(frozen=True)
class Case:
    """One stored weight under examination, oriented so that the fold is M' = M·B.

    Attributes:
        target: whose weight it is.
        stored: M'.
        alike: target → M of every target whose weight is folded in the same way.
        blocks: B, what should have been folded.
    """

    target: Target
    stored: torch.Tensor
    alike: Mapping[Target, torch.Tensor]
    blocks: FloatArray

    @property
    def matrix(self) -> torch.Tensor:
        """M, the base weight."""
        return self.alike[self.target]


def make_case(
    plan: PlannedTensor,
    stored: torch.Tensor,
    planned: Sequence[PlannedTensor],
    rotations: RotationSet,
) -> Case:
    """Orient a stored tensor, its base and the bases it may be confused with."""

    def view(other: PlannedTensor, tensor: torch.Tensor) -> tuple[torch.Tensor, FloatArray]:
        blocks = rotations.column_blocks(other.site.target)
        return orient(tensor, blocks, rotations.site, transposed=other.site.transposed)

    target = plan.site.target
    alike = {
        other.site.target: view(other, tensor_view(other.entry))[0]
        for other in planned
        if len(other.entry.shape) == len(plan.entry.shape)
        and other.site.target.module == target.module
    }
    matrix, blocks = view(plan, stored)
    return Case(target, matrix, alike, blocks)


def explanations(case: Case, rotations: RotationSet) -> list[Hypothesis]:
    """The known mistakes, or the right fold, that are nearest to the stored weight.

    More than one if the storage cannot tell them apart; the right fold is the first, if it is
    among them (``matrix`` and ``blocks`` are then the case's own).
    """
    recovered = None
    if case.matrix.shape[0] >= case.blocks.shape[1]:
        recovered = recover_rotations(case.matrix, case.stored, case.blocks.shape[1]).blocks
    return nearest_hypotheses(
        case.stored, list(hypotheses(case.target, case.alike, rotations, recovered))
    )


def examine(
    case: Case, stored: torch.Tensor, plan: PlannedTensor, rotations: RotationSet
) -> Finding:
    """What is wrong with a stored weight that is not the exact fold.

    Args:
        case: the weight, oriented.
        stored: the same weight as it lies in the file.
        plan: its place in the checkpoint.
        rotations: what should have been folded.
    """
    layer = case.target.layer
    nearest = [(h, arithmetic_of(case.stored, h)) for h in explanations(case, rotations)]
    possible = [
        (h, arithmetic)
        for h, arithmetic in nearest
        # nothing is computed, so nothing is rounded, where nothing is baked
        if arithmetic is PRECISIONS[0] or (arithmetic and h.code != "not_baked")
    ]
    if possible:
        best, arithmetic = min(possible, key=lambda pair: pair[1].unit_roundoff)
        told = Finding(layer, best.code, _note(best, arithmetic, possible))
        if arithmetic is PRECISIONS[0]:
            return told
        # a small edit is no larger than coarse arithmetic's error, but has a better explanation
        return (
            _examine_site(stored, plan, rotations, relative_error(case.stored, best))
            or _examine_map(case, best, layer)
            or told
        )
    if found := _examine_site(stored, plan, rotations, relative_error(case.stored, nearest[0][0])):
        return found
    right = Hypothesis("storage_rounding", "", case.matrix, case.blocks)
    return _examine_map(case, right, layer) or _examine_rest(case, layer)


def _note(
    best: Hypothesis, arithmetic: Precision, possible: Sequence[tuple[Hypothesis, Precision]]
) -> str:
    """The hypothesis, the arithmetic if it shows, and what the storage cannot tell it from."""
    notes = [best.note] if best.note else []
    if not notes or arithmetic is not PRECISIONS[0]:
        notes.append(f"the product was computed in {arithmetic.name}")
    rivals = [h.note or "a right fold" for h, a in possible if a == arithmetic and h is not best]
    if rivals:
        notes.append(f"the storage dtype cannot tell it from: {', '.join(rivals[:_NOTES])}")
    return "; ".join(notes)


def _examine_site(
    stored: torch.Tensor, plan: PlannedTensor, rotations: RotationSet, rival: float
) -> Finding | None:
    """Whether the rotation, or as much of it as there is room for, was folded on the other side.

    ``rival``: relative error of the best explanation so far, to be halved at least.
    """
    other = Site.OUTPUT if rotations.site.is_before else Site.INPUT
    base = tensor_view(plan.entry)
    if base.ndim != 2:
        return None
    for made, blocks in _read_anew(plan.site.target, rotations):
        matrix, b = orient(base, blocks, other, transposed=plan.site.transposed)
        candidate, _ = orient(stored, blocks, other, transposed=plan.site.transposed)
        room = matrix.shape[1] // b.shape[1]
        if room > len(b) or matrix.shape[1] % b.shape[1]:
            return None
        folded = Hypothesis("wrong_site", "", matrix, b[:room])
        nearer = relative_error(candidate, folded) < rival / 2
        if nearer and arithmetic_of(candidate, folded):
            note = f"the rotation was multiplied at the {other} side{made}"
            return Finding(plan.site.target.layer, "wrong_site", note)
    return None


def _read_anew(target: Target, rotations: RotationSet) -> Iterator[tuple[str, FloatArray]]:
    """A target's rotation as it is read, then by the other parametrizations, each of them in both
    conventions; first what is to be said of it."""
    theta = rotations.theta.get(target)
    blocks = [("", rotations.blocks[target])]
    if theta is not None:
        others = set(Parametrization) - {rotations.parametrization, Parametrization.MATRIX}
        blocks += [
            (f", R made by {other}", rotation_blocks(theta, other))
            for other in Parametrization
            if other in others
        ]
    for made, r in blocks:
        if np.isfinite(r).all():
            yield made, r
            yield made, r.transpose(0, 2, 1)


def _examine_map(case: Case, known: Hypothesis, layer: int) -> Finding | None:
    """Whether another linear map than the one known was folded, and nothing else was done."""
    size = case.blocks.shape[1]
    if case.matrix.shape[0] < 2 * size:
        return None
    maps = recover_linear_maps(known.matrix, case.stored, size)
    if maps.residual.max() > _RESIDUAL_FACTOR:
        return None
    gram = np.einsum("nji,njk->nik", maps.blocks, maps.blocks)
    drift = np.linalg.norm(gram - np.eye(size), axis=(1, 2))
    bent = drift > 2 * _SIGNIFICANT * maps.uncertainty
    if bent.any():
        note = f"block(s) {_listed(bent)} are no rotations, ‖RᵀR − I‖ up to {drift.max():.1e}"
        return Finding(layer, "non_orthogonal", note)
    mirrored = np.linalg.det(maps.blocks) < 0
    if mirrored.any():
        note = f"block(s) {_listed(mirrored)} are reflections, det = −1"
        return Finding(layer, "non_orthogonal", note)
    other = distances(maps.blocks, known.blocks) > _SIGNIFICANT * maps.uncertainty
    if not other.any():
        return None
    return Finding(layer, "foreign_edit", f"block(s) {_listed(other)} {_kind(maps, case, other)}")


def _kind(maps: LinearMaps, case: Case, other: Mask) -> str:
    """What the blocks that hold another rotation have in common."""
    b = case.blocks
    known = {
        "were left unrotated": np.broadcast_to(np.eye(b.shape[1]), b.shape),
        "were folded transposed": b.transpose(0, 2, 1),
        "were folded with the sign flipped": -b,
        "were folded twice": b @ b,
    }
    for words, expected in known.items():
        if (distances(maps.blocks, expected) <= _SIGNIFICANT * maps.uncertainty)[other].all():
            return words
    return "hold a rotation that these gates do not make"


def _examine_rest(case: Case, layer: int) -> Finding:
    """Some rows or blocks were changed, or the rotation is off by less than the weight tells."""
    size = case.blocks.shape[1]
    exact = rounded_product(case.matrix, case.blocks)
    error = (exact - case.stored.double()).square()
    unit = ulp(exact, case.stored.dtype).square()
    by_block = (error.shape[0], len(case.blocks), size)
    for what, axes, shape in (("row(s)", 1, error.shape), ("block(s)", (0, 2), by_block)):
        values = (error.reshape(shape).sum(axes) / unit.reshape(shape).sum(axes)).sqrt().numpy()
        changed = values > _EDITED * np.median(values)
        if changed.any():
            note = f"{what} {_listed(changed)} of {values.size} were changed"
            return Finding(layer, "foreign_edit", note)
    if case.matrix.shape[0] >= 2 * size:
        maps = recover_linear_maps(case.matrix, case.stored, size)
        if maps.residual.max() <= _RESIDUAL_FACTOR:
            near = distances(maps.blocks, case.blocks).max()
            note = f"a rotation was folded that is within {near:.0e} of the right one in each block"
            return Finding(layer, "storage_rounding", note)
    note = "no rotation, and no other linear map of the blocks, explains them"
    return Finding(layer, "foreign_edit", note)


def _listed(mask: Mask) -> str:
    found = np.flatnonzero(mask)
    if found.size == mask.size and mask.size > 1:
        return f"0 to {mask.size - 1}"
    return ", ".join(map(str, found[:_NAMED])) + (" …" if found.size > _NAMED else "")
