"""When a weight is not the right fold: what was done instead, and the command that mends it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from so8tqc.check_guide import DIAGNOSES, GUIDE
from so8tqc.checkpoints.patch import tensor_view
from so8tqc.checkpoints.safetensors_index import Checkpoint
from so8tqc.records import Check, Diagnosis, Verdict
from so8tqc.rotations.algebra import FoldComparison
from so8tqc.rotations.rotation_set import RotationSet
from so8tqc.services.weights.examine import Finding, examine, make_case
from so8tqc.services.weights.structure import (
    EFFECT_SHARE,
    EXACT_LIMIT_ULP,
    TargetAlgebra,
    effect_share,
)

_NOTES = 3


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
            findings.append(examine(case, stored, plan, rotations))
        elif effect_share(comparison) < EFFECT_SHARE:
            findings.append(Finding(layer, "storage_rounding", _lost(comparison)))
    return summarise_findings(findings, len(results), model)


def summarise_findings(
    findings: Sequence[Finding], targets: int, model: str, remedies: Mapping[str, str] | None = None
) -> list[Diagnosis]:
    """One diagnosis for each code, the first found first.

    Args:
        findings: of single targets.
        targets: how many targets were examined.
        model: the candidate's name, for the text.
        remedies: code → what mends it, where another bake does not.
    """
    codes = dict.fromkeys(finding.code for finding in findings)
    found = [_diagnosis(code, findings, targets, model) for code in codes]
    others = remedies or {}
    return [d.model_copy(update={"remedy": others.get(d.code, d.remedy)}) for d in found]


def diagnose_structure(checks: Iterable[Check], model: str) -> list[Diagnosis]:
    """Name edits that have nothing to do with the rotations, from the checks that caught them."""
    failed = {c.id: c for c in checks if c.verdict is Verdict.FAIL and c.group == "structure"}
    if {"structure.finite", "structure.untouched"} <= failed.keys() and (
        failed["structure.finite"].value == failed["structure.untouched"].value
    ):
        del failed["structure.untouched"]  # the tensors with NaN, which have a better name
    found = []
    for check in failed.values():
        code = "non_finite" if check.id == "structure.finite" else "foreign_edit"
        text = f"{DIAGNOSES[code].finding} in {model}: {check.detail}"
        found.append(Diagnosis(code=code, text=text, remedy=GUIDE[check.id].remedy))
    return found


def diagnose_logits(
    checks: Iterable[Check], named: Collection[str], converted: Mapping[str, str] | None = None
) -> list[Diagnosis]:
    """Name what only logits show: gates that do too little, a file that lost too much.

    Args:
        checks: all checks of the run.
        named: candidates whose failure their files explain already.
        converted: candidate whose types only round → what is wrong with its conversion.
    """
    failed = [c for c in checks if c.verdict is Verdict.FAIL and c.subject not in named]
    nearest = {c.subject for c in checks if c.id == "algebra.nearest" and c.value is not None}
    found = []
    if any(c.id == "effect.kl" for c in failed):
        found.append(Diagnosis(code="storage_rounding", text=_TOO_SMALL, remedy=_TRAIN))
    for subject in dict.fromkeys(c.subject for c in failed):
        ids = [c.id for c in failed if c.subject == subject and c.id.startswith(_FIDELITY)]
        if ids and converted and subject in converted:
            fault = DIAGNOSES["conversion"]
            text = (
                f"{fault.finding}: {converted[subject]}. The types of {subject} only round, which "
                f"cannot lose so much ({', '.join(ids)})."
            )
            found.append(Diagnosis(code="conversion", text=text, remedy=fault.remedy))
        elif "kl.floor" in ids:
            text = (
                f"{subject} loses more than its types cost an honest encoder: it was made from a "
                "coarser file, or of weights that are not the reference's."
            )
            found.append(Diagnosis(code="storage_rounding", text=text, remedy=_FINER))
        elif subject in nearest and ids:
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
            found.append(Diagnosis(code="not_baked", text=text, remedy=EXPORT))
    return found


def _lost(comparison: FoldComparison) -> str:
    return (
        f"the rotation changes the weight by {comparison.expected_effect:.1e} of its norm, which "
        f"the storage dtype cannot hold: {comparison.effect:.1e} is stored"
    )


EXPORT = (
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


def _diagnosis(code: str, findings: Sequence[Finding], targets: int, model: str) -> Diagnosis:
    concerned = [finding for finding in findings if finding.code == code]
    layers = tuple(sorted({finding.layer for finding in concerned}))
    if code == "not_baked" and len(concerned) < targets:
        code = "layer_missing"
    fault = DIAGNOSES[code]
    notes = "; ".join(list(dict.fromkeys(finding.note for finding in concerned))[:_NOTES])
    where = f"{len(concerned)} of {targets} tensors of {model}"
    text = f"{fault.finding}: {notes} ({where})."
    return Diagnosis(code=code, layers=layers, text=text, remedy=fault.remedy)
