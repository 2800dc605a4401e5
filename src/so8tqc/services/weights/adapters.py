"""Changed tensors of an adapter bake against their exact values, from the files alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from so8tqc.adapters.changed import Changed
from so8tqc.adapters.plan import AdapterPlan
from so8tqc.checkpoints.patch import tensor_view
from so8tqc.checkpoints.safetensors_index import Checkpoint
from so8tqc.progress import SILENT, Progress
from so8tqc.records import Check, judge
from so8tqc.rotations.algebra import FoldComparison, ulp
from so8tqc.rotations.rotation_set import ORTHOGONALITY_LIMIT
from so8tqc.services.weights.structure import compared

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AdapterAlgebra:
    """The comparison of one changed tensor, and where its first NaN or infinity is."""

    changed: Changed
    comparison: FoldComparison
    non_finite: tuple[int, ...] | None = None

    @property
    def place(self) -> str:
        """Its name."""
        return self.changed.entry.name


def adapter_algebra(
    baked: Checkpoint, plan: AdapterPlan, progress: Progress = SILENT
) -> list[AdapterAlgebra]:
    """Compare every changed tensor that has the right shape with the exact one."""
    rows = compared(
        baked, plan.changed, lambda one, entry: compare_changed(one, tensor_view(entry)), progress
    )
    return [AdapterAlgebra(*row) for row in rows]


def compare_changed(changed: Changed, stored: torch.Tensor) -> FoldComparison:
    """A stored tensor beside the exact W', chunk by chunk.

    What float64 itself may be off by, within the bound of the steps, is taken off the distance.
    """
    import torch

    base = tensor_view(changed.entry)
    error = product_norm = effect = base_norm = expected = 0.0
    max_ulp, non_finite = 0.0, 0
    for exact, bound, before, here in changed.chunks(base, stored):
        difference = here.double() - exact
        bad = int(torch.isfinite(difference).logical_not().sum())
        distance = (difference.abs() - bound).clamp_min(0.0) / ulp(exact, stored.dtype)
        max_ulp = math.inf if bad else max(max_ulp, float(distance.max()))
        non_finite += bad
        error = math.hypot(error, _norm(difference))
        product_norm = math.hypot(product_norm, _norm(exact))
        effect = math.hypot(effect, _norm(here.double() - before))
        expected = math.hypot(expected, _norm(exact - before))
        base_norm = math.hypot(base_norm, _norm(before))
    return FoldComparison(
        max_ulp=max_ulp,
        relative_error=_ratio(error, product_norm),
        # a bias may be zero before: its change is then relative to what it becomes
        effect=_ratio(effect, base_norm or product_norm),
        expected_effect=_ratio(expected, base_norm or product_norm),
        non_finite=non_finite,
    )


def adapter_checks(plan: AdapterPlan) -> list[Check]:
    """``rotation.orthogonality`` of OFT adapters: what the *training* did, which the bake keeps."""
    if not plan.drift:
        return []
    module, drift = max(plan.drift.items(), key=lambda item: float(item[1].max()))
    worst = float(drift.max())
    whose = (
        "The training itself computed no rotations (PEFT's truncated series); the bake holds them "
        "exactly as trained"
        if worst > ORTHOGONALITY_LIMIT
        else "As trained"
    )
    return [
        judge(
            "rotation.orthogonality",
            worst,
            max(ORTHOGONALITY_LIMIT, worst),
            target=ORTHOGONALITY_LIMIT,
            detail=f"{whose}: largest ‖RᵀR − I‖_F {worst:.1e} in {module}, "
            f"block {int(np.argmax(drift))}.",
        )
    ]


def _norm(values: torch.Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(values))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (0.0 if part == 0 else math.inf)
