"""A GGUF's attention output weights against the right fold, layer by layer; no model is run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from so8tqc.checkpoints.plan import PlannedTensor
from so8tqc.gguf.file import GGUFFile, GGUFTensor, open_gguf
from so8tqc.gguf.tensor_map import gguf_names
from so8tqc.progress import Progress
from so8tqc.record_kinds.qc import LayerWeight
from so8tqc.records import Check, Diagnosis, judge
from so8tqc.rotations.hypotheses import Hypothesis, relative_error
from so8tqc.rotations.rotation_set import RotationSet
from so8tqc.services.weights.diagnose import EXPORT, summarise_findings
from so8tqc.services.weights.examine import Case, Finding, explanations, make_case

if TYPE_CHECKING:
    import torch

_ERROR_FACTOR = 3.0
_BITS = re.compile(r"(?:Q|FP)(\d)")
_FINEST_BITS = 8
"""A GGUF of any plain type was made from a checkpoint that may have 8 significant bits."""
_LARGEST_ERROR = 0.5
"""A weight that is off by more than this share of its norm is explained by nothing."""


def judge_gguf(
    path: Path,
    planned: Sequence[PlannedTensor],
    rotations: RotationSet,
    subject: str,
    progress: Progress,
) -> tuple[list[Check], list[Diagnosis], dict[str, LayerWeight]]:
    """``algebra.nearest`` of a GGUF file, and what was folded where it fails.

    How far a weight is from the right fold is for ``services.tensors`` to judge. Every hypothesis
    about what was folded (see ``rotations.hypotheses``) is compared with the dequantized weight;
    the right one must be among those nearest to it.

    Returns:
        Checks, diagnoses, and layer → weight.
    """
    gguf = open_gguf(path)
    weights, missing = stored_weights(gguf, planned)
    if not weights:
        return [], [], {}
    findings: list[Finding] = []
    wrong = list(missing)
    rows: dict[str, LayerWeight] = {}
    with progress.task("checking the algebra", total=len(weights), unit="tensors") as task:
        for plan, tensor, stored in weights:
            case = make_case(plan, stored, planned, rotations)
            row = _measure(case, tensor)
            rows[str(case.target.layer)] = row
            found, nearest = _examine(case, row, rotations)
            findings += [found] if found else []
            wrong += [] if nearest else [case.target.layer]
            task.advance(1, item=plan.entry.name)
    findings += [Finding(layer, "foreign_edit", "its weight is missing") for layer in missing]
    diagnosis = summarise_findings(findings, len(planned), subject, {"not_baked": EXPORT})
    return [_check(wrong, len(rows), subject)], diagnosis, rows


def _is_output_weight(plan: PlannedTensor) -> bool:
    return plan.site.attention_output and len(plan.entry.shape) == 2


def stored_weights(
    gguf: GGUFFile, planned: Sequence[PlannedTensor]
) -> tuple[list[tuple[PlannedTensor, GGUFTensor, torch.Tensor]], list[int]]:
    """The attention output weights of a GGUF, dequantized and shaped as the base stores them.

    Other targets (an adapter's q_proj) are left out: the converter reorders their rows. Where the
    name map does not know the architecture, the name is taken that all architectures share.

    Returns:
        (planned tensor, its GGUF tensor, its float32 values), and the layers that have none.
    """
    import torch

    wanted = [p for p in planned if _is_output_weight(p)]
    layers = 1 + max((p.site.target.layer for p in planned), default=0)
    names = gguf_names([p.entry.name for p in wanted], gguf.architecture, layers)
    found, missing = [], []
    for plan in wanted:
        name = names[plan.entry.name] or f"blk.{plan.site.target.layer}.attn_output.weight"
        if names[plan.entry.name] is None and name not in gguf.tensors:
            continue
        tensor = gguf.tensors.get(name)
        values = None if tensor is None else torch.from_numpy(tensor.values().copy())
        if values is not None and plan.site.transposed:
            values = values.T.contiguous()
        if tensor is None or values is None or tuple(values.shape) != plan.entry.shape:
            missing.append(plan.site.target.layer)
        else:
            found.append((plan, tensor, values))
    return found, missing


def error_limit(type_: str) -> float:
    """‖Q − W'‖/‖W'‖ up to which a hypothesis is named as what was folded; no verdict rests on it.

    A type of n bits a weight (Q5_1: 5, scales not counted) errs by about 2⁻ⁿ of the norm; the
    limit is three times that. Measured on SmolLM2-135M, largest of its 30 attention outputs:
    Q8_0 0.0065 (limit 0.012), Q5_0 and Q5_1 0.052 (0.094), Q4_0 0.10 (0.19).
    """
    named = _BITS.search(type_)
    bits = min(int(named[1]) if named else _FINEST_BITS, _FINEST_BITS)
    return min(_ERROR_FACTOR * 2.0**-bits, _LARGEST_ERROR)


def _measure(case: Case, tensor: GGUFTensor) -> LayerWeight:
    import numpy as np

    one = np.broadcast_to(np.eye(case.blocks.shape[1]), case.blocks.shape)
    base = Hypothesis("", "", case.matrix, one)
    right = Hypothesis("", "", case.matrix, case.blocks)
    return {
        "type": tensor.type,
        "error": relative_error(case.stored, right),
        "to_base": relative_error(case.stored, base),
        "rotation": relative_error(case.matrix, right),
    }


def _examine(case: Case, row: LayerWeight, rotations: RotationSet) -> tuple[Finding | None, bool]:
    """What is wrong, if anything, and whether the right fold is among the nearest hypotheses."""
    import torch

    layer = case.target.layer
    if not bool(torch.isfinite(case.stored).all()):
        return Finding(layer, "non_finite", "NaN or infinite elements"), False
    nearest = explanations(case, rotations)
    right = any(h.is_right for h in nearest)
    if right and row["error"] <= _LARGEST_ERROR:
        return None, True
    if not right and relative_error(case.stored, nearest[0]) <= error_limit(row["type"]):
        return Finding(layer, nearest[0].code, nearest[0].note), False
    return Finding(layer, "foreign_edit", "nothing that is known explains the weight"), False


def _check(wrong: Sequence[int], layers: int, subject: str) -> Check:
    listed = ", ".join(map(str, wrong[:8])) + (" …" if len(wrong) > 8 else "")
    return judge(
        "algebra.nearest",
        len(wrong),
        0,
        subject=subject,
        detail=f"Layers whose attention output is not the right fold: {listed}."
        if wrong
        else f"In all {layers} layers the right fold explains the attention output best.",
    )
