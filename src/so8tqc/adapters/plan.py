"""All tensors that adapters, and gates in front of them, change in a checkpoint.

Order. Adapters apply in the order given, the later one to what the earlier made; adapters of one
method that follow one another apply as PEFT's forward applies adapters that are active together
(``methods`` says how: of OFT the *last* is the first step). SO8T gates are in front of the base
layer and of every branch beside it, so they are the last step at the input site, and likewise at
the output site: (W + s·B·A)·R, C·(W + s·B·A).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from so8tqc.adapters.builder import Builder
from so8tqc.adapters.changed import Changed
from so8tqc.adapters.files import AdapterFiles, read_files
from so8tqc.adapters.same_base import other_name, require_same_base
from so8tqc.adapters.settings import require_understood
from so8tqc.checkpoints.safetensors_index import Checkpoint
from so8tqc.rotations.rotation_set import FloatArray, RotationSet


@dataclass(frozen=True)
class AdapterPlan:
    """What a bake of adapters writes.

    Attributes:
        checkpoint: the base.
        adapters: in order.
        changed: every tensor that changes, by name.
        notices: for the user.
        drift: module → ‖RᵀR − I‖_F of each block, of OFT adapters' own training.
        gates: the rotations in front, if any.
    """

    checkpoint: Checkpoint
    adapters: tuple[AdapterFiles, ...]
    changed: tuple[Changed, ...]
    notices: tuple[str, ...]
    drift: Mapping[str, FloatArray] = field(default_factory=dict)
    gates: RotationSet | None = None


def plan_adapters(
    checkpoint: Checkpoint,
    paths: Sequence[Path],
    gates: RotationSet | None,
    *,
    dtype: str,
    kept: Mapping[str, str] | None = None,
) -> AdapterPlan:
    """Every tensor that the adapters change, with shapes checked.

    Args:
        checkpoint: the base model's weights.
        paths: adapter directories, in the order in which they apply.
        gates: rotations in front of them, widened; None: none.
        dtype: ``keep`` or a torch dtype name for the changed tensors.
        kept: tensor → dtype that ``keep`` means, where the base has another for the bake.

    Raises:
        RotationError: an adapter is malformed, of another base, untrained, or changes what the base
            does not have or cannot hold.
        ShapeError: shapes disagree.
        ModelError: a tensor is stored in a dtype that cannot be baked.
    """
    builder = Builder(checkpoint, dtype, kept or {})
    read = [read_files(path) for path in paths]
    for files in read:
        require_understood(files)
        require_same_base(files, checkpoint)
        told = other_name(files, checkpoint)
        builder.notices += files.notices if told is None else (*files.notices, told)
    for group in _groups(read):
        builder.add_group(group)
    builder.add_gates(gates)
    return AdapterPlan(
        checkpoint=checkpoint,
        adapters=tuple(read),
        changed=builder.changed(),
        notices=tuple(dict.fromkeys(builder.notices)),
        drift=builder.drift,
        gates=gates,
    )


def _groups(adapters: Sequence[AdapterFiles]) -> Iterator[list[AdapterFiles]]:
    """Neighbours of one method, in the order of their steps."""
    group: list[AdapterFiles] = []
    for files in adapters:
        if group and group[0].kind != files.kind:
            yield _ordered(group)
            group = []
        group.append(files)
    if group:
        yield _ordered(group)


def _ordered(group: list[AdapterFiles]) -> list[AdapterFiles]:
    return group[::-1] if group[0].kind == "OFT" else group
