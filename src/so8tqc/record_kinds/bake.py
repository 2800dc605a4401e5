"""Bakes and plans of bakes: the rotations' drift and angles, and what they did to weights."""

from __future__ import annotations

from pydantic import Field

from so8tqc.record_kinds.base import Entry, Metrics


class LayerDrift(Entry):
    """The blocks of one target: ‖RᵀR − I‖_F and rotation angles (radians)."""

    layer: int | None
    target: str | None
    blocks: int | None
    orthogonality_max: float | None
    orthogonality_mean: float | None
    angle_max: float | None
    angle_mean: float | None


class FoldedLayer(LayerDrift):
    """The same beside the tensor that was folded.

    Attributes:
        effect: ‖W′ − W‖ / ‖W‖.
        relative_error: ‖W′ − W·R‖ / ‖W·R‖, the distance from the exact fold.
        max_ulp: the same, of the worst element in units of its last place.
        sha256_before, sha256_after: of the tensor.
    """

    tensor: str | None
    effect: float | None
    relative_error: float | None
    max_ulp: float | None
    sha256_before: str | None
    sha256_after: str | None


class HowRead(Entry):
    """How the rotations were read; ``recognised`` by which names, None where all was stated."""

    parametrization: str
    convention: str
    site: str
    recognised: str | None


class AppliedAdapter(Entry):
    """An adapter: its method (``peft_type``), and how many modules it changes."""

    kind: str
    modules: int


class BakeMetrics(Metrics):
    """Of kind ``bake``.

    Attributes:
        layers: of every folded tensor; empty for a bake that was not verified.
        orthogonality: ‖RᵀR − I‖_F, targets × blocks.
        bytes_written: of the baked model.
        reading: how the rotations were read.
        adapters: that were merged, in order.
    """

    layers: list[FoldedLayer]
    orthogonality: list[list[float]]
    bytes_written: int | None
    reading: HowRead | None = None
    adapters: list[AppliedAdapter] = Field(default_factory=list)


class PlannedFold(Entry):
    """A tensor that would be folded; ``bytes`` of the stored one."""

    name: str
    shape: list[int]
    dtype: str
    baked_dtype: str
    bytes: int


class PlanMetrics(Metrics):
    """Of kind ``bake-plan``; ``memory_bytes`` is an upper estimate beyond the libraries."""

    tensors: list[PlannedFold]
    layers: list[LayerDrift]
    orthogonality: list[list[float]]
    bytes_written: int
    disk_free_bytes: int
    memory_bytes: int
    reading: HowRead | None = None
