"""When a weight is not the right fold: what was done instead, and the command that mends it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from so8tqc.checkpoints.patch import tensor_view
from so8tqc.checkpoints.plan import PlannedTensor
from so8tqc.checkpoints.safetensors_index import Checkpoint
from so8tqc.records import Check, Diagnosis, Verdict
from so8tqc.rotations.algebra import FoldComparison, ulp
from so8tqc.rotations.enums import Convention, Site
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
from so8tqc.rotations.recover import (
    LinearMaps,
    distances,
    recover_linear_maps,
    recover_rotations,
)
from so8tqc.rotations.rotation_set import FloatArray, RotationSet, Target
from so8tqc.services.structure import EFFECT_SHARE, EXACT_LIMIT_ULP, TargetAlgebra, effect_share

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


def diagnose(
    results: Sequence[TargetAlgebra], baked: Checkpoint, rotations: RotationSet, model: str
) -> list[Diagnosis]:
    """Explain every target whose stored weight is not the exact fold, or does not show it.

    Args:
        results: the algebra of the candidate's targets.
        baked: the candidate.
        rotations: what should have been folded.
        model: the candidate's name, for the text.

    Returns:
        One diagnosis for each code found, with the layers it concerns.
    """
    planned = [result.planned for result in results]
    findings = []
    for result in results:
        plan, comparison = result.planned, result.comparison
        layer = plan.site.target.layer
        if comparison.non_finite:
            note = f"{comparison.non_finite} NaN or infinite elements"
            findings.append(Finding(layer, "non_finite", note))
        elif comparison.max_ulp > EXACT_LIMIT_ULP:
            stored = tensor_view(baked.tensors[plan.entry.name])
            case = make_case(plan, stored, planned, rotations)
            findings.append(_examine(case, stored, plan, rotations))
        elif effect_share(comparison) < EFFECT_SHARE:
            findings.append(Finding(layer, "storage_rounding", _lost(comparison)))
    return summarise_findings(findings, len(results), model)


def summarise_findings(findings: Sequence[Finding], targets: int, model: str) -> list[Diagnosis]:
    """One diagnosis for each code, the first found first.

    Args:
        findings: of single targets.
        targets: how many targets were examined.
        model: the candidate's name, for the text.
    """
    codes = dict.fromkeys(finding.code for finding in findings)
    return [_diagnosis(code, findings, targets, model) for code in codes]


def diagnose_structure(checks: Iterable[Check], model: str) -> list[Diagnosis]:
    """Name edits that have nothing to do with the rotations, from the checks that caught them."""
    failed = {c.id: c for c in checks if c.verdict is Verdict.FAIL and c.id in _STRUCTURE_REMEDIES}
    if "structure.finite" in failed and (
        failed["structure.finite"].value == failed["structure.untouched"].value
    ):
        del failed["structure.untouched"]  # the tensors with NaN, which have a better name
    found = []
    for check in failed.values():
        code = "non_finite" if check.id == "structure.finite" else "foreign_edit"
        text = f"{_TEXTS[code][0]} in {model}: {check.detail}"
        found.append(Diagnosis(code=code, text=text, remedy=_STRUCTURE_REMEDIES[check.id]))
    return found


def diagnose_logits(checks: Iterable[Check], named: Collection[str]) -> list[Diagnosis]:
    """Name what only logits show: gates that do too little, a file that lost too much.

    Args:
        checks: all checks of the run.
        named: candidates whose failure their files explain already.
    """
    failed = [c for c in checks if c.verdict is Verdict.FAIL and c.subject not in named]
    nearest = {c.subject for c in checks if c.id == "algebra.nearest" and c.value is not None}
    found = []
    if any(c.id == "effect.kl" for c in failed):
        found.append(Diagnosis(code="storage_rounding", text=_TOO_SMALL, remedy=_TRAIN))
    for subject in dict.fromkeys(c.subject for c in failed):
        ids = [c.id for c in failed if c.subject == subject and c.id.startswith(_FIDELITY)]
        if subject in nearest and ids:
            text = (
                f"{subject} holds the right rotation in every layer, but {', '.join(ids)} failed: "
                "its quantization loses too much, or erases the gate."
            )
            found.append(Diagnosis(code="storage_rounding", text=text, remedy=_FINER))
        elif "effect.survival" in ids:
            text = (
                f"{subject} is no nearer to the gated model than to the base: it was made from "
                "the unbaked model, or its quantization erased the gate."
            )
            found.append(Diagnosis(code="not_baked", text=text, remedy=_EXPORT))
    return found


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


def _examine(
    case: Case, stored: torch.Tensor, plan: PlannedTensor, rotations: RotationSet
) -> Finding:
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
    other = Site.OUTPUT if rotations.site is Site.INPUT else Site.INPUT
    base = tensor_view(plan.entry)
    if base.ndim != 2:
        return None
    column = rotations.column_blocks(plan.site.target)
    for convention in Convention:
        blocks = column if convention is Convention.COLUMN else column.transpose(0, 2, 1)
        matrix, b = orient(base, blocks, other, transposed=plan.site.transposed)
        candidate, _ = orient(stored, blocks, other, transposed=plan.site.transposed)
        room = matrix.shape[1] // b.shape[1]
        if room > len(b) or matrix.shape[1] % b.shape[1]:
            return None
        folded = Hypothesis("wrong_site", "", matrix, b[:room])
        nearer = relative_error(candidate, folded) < rival / 2
        if nearer and arithmetic_of(candidate, folded):
            note = f"the rotation was multiplied at the {other} side"
            return Finding(plan.site.target.layer, "wrong_site", note)
    return None


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


def _lost(comparison: FoldComparison) -> str:
    return (
        f"the rotation changes the weight by {comparison.expected_effect:.1e} of its norm, which "
        f"the storage dtype cannot hold: {comparison.effect:.1e} is stored"
    )


_REBAKE = "Bake again from the base model: so8tqc bake BASE ROTATIONS --out DIR"

_TEXTS = {
    "not_baked": ("The gate was never folded in", _REBAKE),
    "layer_missing": ("The gate was not folded in some layers", _REBAKE),
    "transposed": (
        "The transposed rotation was folded",
        "Bake again with the convention of the training: so8tqc bake BASE ROTATIONS --out DIR "
        "--convention column (or row).",
    ),
    "double_baked": ("The rotation was folded twice", _REBAKE + " (from the unbaked base)."),
    "wrong_parametrization": (
        "The rotation was made from theta by another parametrization",
        "Bake again as in training: so8tqc bake BASE ROTATIONS --out DIR --parametrization exp "
        "(or cayley, legacy-taylor).",
    ),
    "layers_permuted": ("Layers were interchanged", _REBAKE),
    "blocks_permuted": ("The blocks of the rotation were folded in another order", _REBAKE),
    "wrong_site": (
        "The rotation was folded on the other side of the projection",
        "Bake again as in training: so8tqc bake BASE ROTATIONS --out DIR --site input (or output).",
    ),
    "foreign_edit": ("Something else was changed", _REBAKE),
    "non_finite": ("There are NaN or infinite values", _REBAKE + " --baked-dtype float32"),
    "non_orthogonal": (
        "What was folded is no rotation",
        _REBAKE + " (--orthogonalize polar if the trained matrices themselves have drifted).",
    ),
    "storage_rounding": (
        "The right rotation, with more rounding than it bears",
        _REBAKE + " --baked-dtype float32",
    ),
}

_EXPORT = (
    "Export again from the baked directory: so8tqc export BAKED --out FILE (or choose a finer "
    "quantization type)."
)
_FINER = (
    "Quantize the F16 export to a finer type, or with the importance matrix of this model: so8tqc "
    "quantize FILE.gguf --type Q8_0 --out DIR"
)
_TOO_SMALL = (
    "The gates change less than rounding does, so no logits can show whether they were folded."
)
_TRAIN = (
    "Train the gates further, or bake with --baked-dtype float32 and judge the files alone: so8tqc "
    "qc … --level files"
)
_FIDELITY = ("kl.", "logits.", "calibration.", "effect.survival")

_COPY = "Copy it from the base model, or bake again: so8tqc bake BASE ROTATIONS --out DIR"

_STRUCTURE_REMEDIES = {
    "structure.missing": _REBAKE,
    "structure.added": _REBAKE,
    "structure.shapes": _REBAKE,
    "structure.dtypes": _REBAKE,
    "structure.untouched": _REBAKE,
    "structure.finite": _REBAKE,
    "structure.gates": _REBAKE,
    "structure.config": _COPY,
    "structure.tokenizer": _COPY,
}


def _diagnosis(code: str, findings: Sequence[Finding], targets: int, model: str) -> Diagnosis:
    concerned = [finding for finding in findings if finding.code == code]
    layers = tuple(sorted({finding.layer for finding in concerned}))
    if code == "not_baked" and len(concerned) < targets:
        code = "layer_missing"
    text, remedy = _TEXTS[code]
    notes = "; ".join(list(dict.fromkeys(finding.note for finding in concerned))[:_NOTES])
    where = f"{len(concerned)} of {targets} tensors of {model}"
    return Diagnosis(code=code, layers=layers, text=f"{text}: {notes} ({where}).", remedy=remedy)
