"""R of every target of a source, from its parameters."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from so8tqc.errors import RotationError
from so8tqc.rotations.enums import Parametrization
from so8tqc.rotations.parametrization import rotation_blocks
from so8tqc.rotations.rotation_set import FloatArray, Target


def target_blocks(
    theta: Mapping[Target, FloatArray], parametrization: Parametrization, source: str
) -> dict[Target, FloatArray]:
    """R of every target, in one batch where blocks do not depend on their neighbours.

    Args:
        theta: target → [N, b, b].
        parametrization: how theta becomes R.
        source: where it comes from, for messages.

    Raises:
        RotationError: theta is not finite, or too large for R to be.
    """
    for target, value in theta.items():
        require_finite(value, f"{source}, {target}")
    blocks: dict[Target, FloatArray] = {}
    for group in _batches(theta, parametrization):
        together = rotation_blocks(np.concatenate([theta[t] for t in group]), parametrization)
        ends = np.cumsum([theta[t].shape[0] for t in group])
        blocks |= dict(zip(group, np.split(together, ends[:-1]), strict=True))
    for target, value in theta.items():
        _require_finite_result(blocks[target], value, f"{source}, {target}")
    return {target: blocks[target] for target in theta}


def require_finite(theta: FloatArray, where: str) -> None:
    """Refuse parameters that are not numbers.

    Raises:
        RotationError: naming the first.
    """
    finite = np.isfinite(theta)
    if not finite.all():
        at = np.unravel_index(int(np.argmin(finite)), theta.shape)
        raise RotationError(
            f"theta of block {at[0]} has a non-finite value at [{at[1]}, {at[2]}]",
            where=where,
            remedy="Restore an earlier checkpoint; nothing can be baked from this one.",
        )


def _batches(
    theta: Mapping[Target, FloatArray], parametrization: Parametrization
) -> list[list[Target]]:
    """Targets whose blocks may be computed together: those of one size, unless per layer."""
    if parametrization.is_per_layer:
        return [[target] for target in theta]
    sizes: dict[int, list[Target]] = {}
    for target, value in theta.items():
        sizes.setdefault(value.shape[1], []).append(target)
    return list(sizes.values())


def _require_finite_result(blocks: FloatArray, theta: FloatArray, where: str) -> None:
    finite = np.isfinite(blocks).all(axis=(1, 2))
    if not finite.all():
        largest = float(np.abs(theta[np.argmin(finite)]).max())
        raise RotationError(
            f"R of block {int(np.argmin(finite))} is non-finite: theta reaches {largest:.1e}",
            where=where,
            remedy="Restore an earlier checkpoint; nothing can be baked from this one.",
        )
