"""A layer's projection, run as transformers runs it, with its gate and with the gate folded in.

All other algebra believes that a stored matrix is used as W·x, or as x·S where transformers' module
is a Conv1D. A square matrix would not show the difference; the module itself does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from so8tqc.checkpoints.plan import PlannedTensor
from so8tqc.checkpoints.safetensors_index import Checkpoint, load_tensor
from so8tqc.checkpoints.skeleton import Skeleton, materialized, skeleton
from so8tqc.records import Check, judge, skipped
from so8tqc.rotations.enums import Site
from so8tqc.rotations.fold import orient, rounded_product
from so8tqc.rotations.rotation_set import RotationSet

CHECK = "algebra.projection"
LIMIT = 1e-10
"""Relative; float64 rounds sums of thousands of products by 1e-13."""

_ROWS = 4


def projection_check(
    base: Checkpoint, planned: Sequence[PlannedTensor], rotations: RotationSet
) -> Check:
    """``algebra.projection``: of one target of each kind, module(gate(x)) against folded module(x).

    The module is transformers' own, with the stored weights in float64; x is random. A model that
    transformers does not know is a skip.
    """
    built = skeleton(base)
    worst, tried = 0.0, []
    for plan in _one_of_each_kind(planned, built):
        module = built and built.module_of(built.name_in_model(plan.site.weight))
        if module is None:
            continue
        worst = max(worst, _disagreement(base, plan, rotations, materialized(module)))
        tried.append(plan.site.weight)
    if not tried:
        kind = base.model_type
        return skipped(CHECK, f"transformers has no module for the rotated weights of {kind!r}.")
    return judge(
        CHECK,
        worst,
        LIMIT,
        detail="Relative distance of the projection with its gate from the same with the gate "
        f"folded into its weight, as transformers computes both, in float64: {', '.join(tried)}.",
    )


def _one_of_each_kind(
    planned: Sequence[PlannedTensor], built: Skeleton | None
) -> list[PlannedTensor]:
    """The first target of each module name and class."""
    kinds: dict[tuple[object, ...], PlannedTensor] = {}
    for plan in planned:
        module = built and built.module_of(built.name_in_model(plan.site.weight))
        kinds.setdefault((plan.site.target.module, type(module)), plan)
    return list(kinds.values())


def _disagreement(
    base: Checkpoint, plan: PlannedTensor, rotations: RotationSet, module: Any
) -> float:
    import torch

    site = plan.site
    column = rotations.column_blocks(site.target)
    weight = load_tensor(base.tensors[site.weight]).double()
    bias = None if site.bias is None else load_tensor(base.tensors[site.bias]).double()
    width = column.shape[0] * column.shape[1]
    generator = torch.Generator().manual_seed(0)
    inputs = width if rotations.site.is_before else weight.shape[int(not site.transposed)]
    x = torch.randn(_ROWS, inputs, dtype=torch.float64, generator=generator)

    def run(weight_: torch.Tensor, bias_: torch.Tensor | None, given: torch.Tensor) -> torch.Tensor:
        module.weight.data = weight_
        if bias_ is not None:
            module.bias.data = bias_
        result: torch.Tensor = module(given)
        return result

    def turned(values: torch.Tensor) -> torch.Tensor:
        blocks = values.reshape(_ROWS, column.shape[0], column.shape[1])
        return torch.einsum("nij,bnj->bni", torch.from_numpy(np.array(column)), blocks).flatten(1)

    with torch.inference_mode():
        if rotations.site.is_before:
            expected = run(weight, bias, turned(x))
        else:
            expected = turned(run(weight, bias, x))
        folded, folded_bias = weight.clone(), None if bias is None else bias.clone()
        parts = [folded] + ([folded_bias] if rotations.site is Site.OUTPUT else [])
        for stored in (part for part in parts if part is not None):
            view, blocks = orient(stored, column, rotations.site, transposed=site.transposed)
            view.copy_(rounded_product(view.clone(), blocks))
        found = run(folded, folded_bias, x)
    return float((found - expected).norm() / expected.norm())
