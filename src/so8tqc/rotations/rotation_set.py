"""A model's rotations: validated once, at construction, and immutable."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from so8tqc.errors import RotationError
from so8tqc.rotations.enums import Convention, Parametrization, Site

FloatArray = npt.NDArray[np.float64]

ORTHOGONALITY_LIMIT = 1e-3
"""Largest accepted ‖RᵀR − I‖_F of a block."""


@dataclass(frozen=True)
class Target:
    """The projection a rotation belongs to.

    Attributes:
        layer: zero-based index of the decoder layer.
        module: dotted name below the layer, e.g. ``self_attn.q_proj``; None is the
            attention output projection, whatever this architecture calls it.
    """

    layer: int
    module: str | None = None

    def __str__(self) -> str:
        return "output head" if self.is_head else f"layer {self.layer} {self.module or _OUTPUT}"

    @property
    def is_head(self) -> bool:
        """Whether it is the output head, which belongs to no layer."""
        return self.layer < 0


_OUTPUT = "attention output"

HEAD = Target(-1)
"""The output head."""


def in_order(targets: Iterable[Target]) -> Iterator[Target]:
    """By layer, then by module."""
    return iter(sorted(targets, key=lambda t: (t.layer, t.module or "")))


def layers_of(targets: Iterable[Target]) -> tuple[int, ...]:
    """Layers that have a target, ascending."""
    return tuple(sorted({target.layer for target in targets if not target.is_head}))


@dataclass(frozen=True)
class RotationSet:
    """Rotation blocks of a model, every block in SO(b).

    Attributes:
        blocks: target → [N, b, b] float64, the matrices R_1 … R_N as the source
            defines them, *before* the convention is applied. b is 8 for SO8T gates;
            OFT adapters may have another block size.
        convention: how the gate multiplies with R.
        site: before or after the projection.
        parametrization: how R was made from theta.
        theta: target → [N, b, b] raw parameters, where the source has them.
        source: the file or directory they were read from.
        shared: each target has one block, repeated over all its features; such a set must be
            widened to a model (``checkpoints.plan.widened``) before it is used.
        metadata: what the source says about itself (e.g. ``pet``).
        notices: what was recognised or overridden while reading, to be shown to the user.
        strength: s of a target whose gate computes x + s·R·x; all others compute R·x.

    Raises:
        RotationError: empty; a block is not square, not finite, farther than 1e-3
            (Frobenius) from orthogonal, or has a negative determinant (which is allowed in front
            of the output head).
    """

    blocks: Mapping[Target, FloatArray]
    convention: Convention
    site: Site
    parametrization: Parametrization
    source: str
    shared: bool = False
    theta: Mapping[Target, FloatArray] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    strength: Mapping[Target, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.blocks:
            raise RotationError("contains no rotations", where=self.source)
        for target, blocks in self.blocks.items():
            _validate(target, blocks, self.source)
        for name in ("blocks", "theta", "metadata", "strength"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __iter__(self) -> Iterator[Target]:
        return in_order(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    @cached_property
    def drift(self) -> Mapping[Target, FloatArray]:
        """Target → [N] ‖RᵀR − I‖_F of its blocks."""
        return {target: orthogonality_error(self.blocks[target]) for target in self}

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have a rotation, ascending."""
        return layers_of(self.blocks)

    def shape(self, target: Target) -> tuple[int, ...]:
        """(N, b, b) of a target's blocks."""
        return self.blocks[target].shape

    def column_blocks(self, target: Target) -> FloatArray:
        """[N, b, b] matrices C with which the gate computes C·x for a column vector x.

        column: C = R. row: the gate computes x_row·R, whose transpose is Rᵀ·x, so C = Rᵀ.
        With a strength s the gate computes x + s·R·x, so C = I + s·R (or I + s·Rᵀ).
        """
        blocks = self.blocks[target]
        if self.convention is Convention.ROW:
            blocks = np.ascontiguousarray(blocks.transpose(0, 2, 1))
        if target in self.strength:
            return np.eye(blocks.shape[1]) + self.strength[target] * blocks
        return blocks

    @property
    def fingerprint(self) -> str:
        """SHA-256 over targets, convention, site and the float64 bytes of every block."""
        digest = hashlib.sha256(f"{self.convention}|{self.site}".encode())
        for target in self:
            blocks = np.ascontiguousarray(self.blocks[target], dtype="<f8")
            digest.update(f"|{target.layer}|{target.module or ''}|{blocks.shape}|".encode())
            digest.update(blocks.tobytes())
            if target in self.strength:
                digest.update(f"|strength {self.strength[target].hex()}".encode())
        return digest.hexdigest()


def orthogonality_error(blocks: FloatArray) -> FloatArray:
    """‖RᵀR − I‖_F of each block: [N, b, b] → [N]."""
    gram = np.einsum("nji,njk->nik", blocks, blocks)
    error: FloatArray = np.linalg.norm(gram - np.eye(blocks.shape[-1]), axis=(1, 2))
    return error


def rotation_angles(blocks: FloatArray) -> FloatArray:
    """Rotation angles of each block in radians, [N, b, b] → [N, b], each in [0, π].

    They are the arguments of the eigenvalues, which lie on the unit circle in
    conjugate pairs: every angle of a plane appears twice.
    """
    angles: FloatArray = np.abs(np.angle(np.linalg.eigvals(blocks)))
    return angles


def _validate(target: Target, blocks: FloatArray, source: str) -> None:
    where = f"{source}, {target}"
    if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2] or blocks.shape[0] == 0:
        raise RotationError(
            f"blocks have shape {list(blocks.shape)}, expected [N, b, b]", where=where
        )
    if blocks.dtype != np.float64:
        raise RotationError(f"blocks are {blocks.dtype}, expected float64", where=where)
    finite = np.isfinite(blocks).all(axis=(1, 2))
    if not finite.all():
        raise RotationError(
            f"block {int(np.argmin(finite))} has a non-finite value",
            where=where,
            remedy="Train again or restore an earlier checkpoint; nothing can be baked from it.",
        )
    errors = orthogonality_error(blocks)
    worst = int(np.argmax(errors))
    if errors[worst] > ORTHOGONALITY_LIMIT:
        raise RotationError(
            f"block {worst} is not orthogonal: ‖RᵀR − I‖_F = {errors[worst]:.2e}, "
            f"limit {ORTHOGONALITY_LIMIT:.0e}",
            where=where,
            remedy="Check the parametrization, or use --orthogonalize polar to bake the "
            "nearest rotation instead of the trained matrix.",
        )
    determinants = np.linalg.det(blocks)
    if (determinants < 0).any() and not target.is_head:
        raise RotationError(
            f"block {int(np.argmin(determinants))} is a reflection: det = "
            f"{determinants.min():.3f}, a rotation has +1",
            where=where,
            remedy="A reflection cannot come from exp or cayley: check how the file was made.",
        )
