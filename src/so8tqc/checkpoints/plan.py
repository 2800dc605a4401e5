"""What a bake will do to a checkpoint: decided before the first byte is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np

from so8tqc.checkpoints.safetensors_index import ITEM_BYTES, Checkpoint, TensorEntry, torch_dtype
from so8tqc.checkpoints.sites import TensorSite, locate, require_all_layers
from so8tqc.errors import RotationError, ShapeError
from so8tqc.rotations.enums import Site
from so8tqc.rotations.rotation_set import RotationSet, Target
from so8tqc.threads import WORKERS

CHUNK_ELEMENTS = 1 << 18
"""Elements that one thread folds at a time: 2 MiB in float64."""

NOTHING: Mapping[str, str] = MappingProxyType({})

DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to be folded.

    Attributes:
        site: the target and its tensors' names.
        entry: the tensor in the base checkpoint (the weight, or the bias at the output site).
        dtype: safetensors name of the dtype it will be stored in.
    """

    site: TensorSite
    entry: TensorEntry
    dtype: str


class Turning(Protocol):
    """What a plan must know of rotations: a ``RotationSet``, or its source."""

    @property
    def site(self) -> Site:
        """Where the gates are."""

    @property
    def source(self) -> str:
        """Where the rotations come from."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have a rotation."""

    def __iter__(self) -> Iterator[Target]: ...

    def shape(self, target: Target) -> tuple[int, ...]:
        """(N, b, b) of a target's blocks."""


def plan_bake(
    checkpoint: Checkpoint,
    rotations: Turning,
    *,
    dtype: str,
    all_layers: bool,
    kept: Mapping[str, str] = NOTHING,
) -> tuple[PlannedTensor, ...]:
    """Every tensor to fold, with shapes checked.

    Args:
        checkpoint: the base model's weights.
        rotations: what to fold in, or its source; shared blocks must have been widened.
        dtype: ``keep`` or a torch dtype name for the folded tensors.
        all_layers: require a rotation for every layer of the model, if any layer has one.
        kept: tensor → dtype that ``keep`` means for it, where that is not the one it has.

    Raises:
        RotationError: a gate without a layer, a layer with attention without a gate, or layers
            that share a weight and do not all have one.
        ShapeError: N·b differs from the projection's features at the site.
        ModelError: a tensor is stored in a dtype that cannot be folded.
    """
    if all_layers and rotations.site is not Site.HEAD:
        require_all_layers(rotations.layers, checkpoint)
    planned: list[PlannedTensor] = []
    for site in _one_for_each_weight(locate(tuple(rotations), checkpoint)):
        _check_shape(checkpoint.tensors[site.weight], site, rotations)
        tensors = [site.weight]
        if rotations.site is Site.OUTPUT and site.bias is not None:
            tensors.append(site.bias)
        for name in tensors:
            entry = checkpoint.tensors[name]
            torch_dtype(entry.dtype)
            planned.append(
                PlannedTensor(site, entry, DTYPE_NAMES.get(dtype, kept.get(name, entry.dtype)))
            )
    return tuple(planned)


def _one_for_each_weight(sites: Sequence[TensorSite]) -> Iterator[TensorSite]:
    """Sites of distinct weights: one that several layers share is folded once.

    Raises:
        RotationError: some of the layers that share a weight have no gate.
    """
    gated = {(site.weight, site.target.layer) for site in sites}
    seen: set[str] = set()
    for site in sites:
        if bare := [i for i in site.sharing if (site.weight, i) not in gated]:
            raise RotationError(
                f"{site.weight} is the projection of layers {_listed(site.sharing)} at once, but "
                f"layer(s) {_listed(bare)} have no gate: what is folded for one is folded for all",
                remedy="Give every layer that shares the weight the same gate.",
            )
        if site.weight not in seen:
            seen.add(site.weight)
            yield site


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers))


def fitted(rotations: RotationSet, checkpoint: Checkpoint) -> RotationSet:
    """The rotations as they fit a model: widened, and equal where layers share a weight.

    Raises:
        RotationError: a target does not exist; or layers that share a weight have other gates.
        ShapeError: the block size of a shared block does not divide the features.
    """
    wide = widened(rotations, checkpoint)
    first: dict[str, Target] = {}
    for site in locate(tuple(wide), checkpoint):
        other = first.setdefault(site.weight, site.target)
        if not np.array_equal(wide.blocks[other], wide.blocks[site.target]):
            raise RotationError(
                f"{other} and {site.target} have different gates, but one weight: {site.weight}",
                where=wide.source,
                remedy="A weight that layers share can be rotated in one way only. Train one gate "
                "for all of them.",
            )
    return wide


def widened(rotations: RotationSet, checkpoint: Checkpoint) -> RotationSet:
    """A set whose shared blocks are repeated over the features of their projections.

    A set without shared blocks is returned as it is.

    Raises:
        RotationError: a target does not exist.
        ShapeError: the block size does not divide the features.
    """
    if not rotations.shared:
        return rotations
    blocks = {}
    for site in locate(tuple(rotations), checkpoint):
        one = rotations.blocks[site.target]
        width = _features(checkpoint.tensors[site.weight], site, rotations)
        if width % one.shape[1]:
            raise ShapeError(
                f"{site.target}: a shared block of {one.shape[1]} does not divide {width} features",
                where=rotations.source,
            )
        blocks[site.target] = np.repeat(one, width // one.shape[1], axis=0)
    return dataclasses.replace(rotations, blocks=blocks, theta={}, shared=False)


def bytes_needed(checkpoint: Checkpoint, planned: tuple[PlannedTensor, ...]) -> int:
    """Bytes of the baked weights on disk."""
    grown = sum(
        (p.entry.end - p.entry.start) // ITEM_BYTES[p.entry.dtype] * ITEM_BYTES[p.dtype]
        - (p.entry.end - p.entry.start)
        for p in planned
    )
    return checkpoint.bytes + grown


MEMORY_ARRAYS = 12
"""Float64 arrays of a chunk's size that the fold holds at once, generously counted."""


def memory_estimate(planned: tuple[PlannedTensor, ...]) -> int:
    """Bytes that folding needs beyond the libraries: each thread's mapped tensor and arrays."""
    largest = max((p.entry.end - p.entry.start for p in planned), default=0)
    return WORKERS * (largest + MEMORY_ARRAYS * 8 * CHUNK_ELEMENTS)


def _check_shape(entry: TensorEntry, site: TensorSite, rotations: Turning) -> None:
    if len(entry.shape) != 2:
        raise ShapeError(f"{entry.name} has shape {list(entry.shape)}, expected a matrix")
    width = _features(entry, site, rotations)
    count, size, _ = rotations.shape(site.target)
    if count * size != width:
        raise ShapeError(
            f"{site.target}: {count} blocks of {size} cover {count * size} features, but "
            f"{entry.name} with shape {list(entry.shape)} has {width} at its {rotations.site}",
            where=rotations.source,
            remedy="The rotations belong to another model. (The input width of an attention "
            "output projection is heads × head_dim, not always hidden_size.)",
        )


def _features(entry: TensorEntry, site: TensorSite, rotations: Turning) -> int:
    """Features of the projection at the rotation's site."""
    along_rows = rotations.site.is_before == site.transposed
    return entry.shape[0 if along_rows else 1]
