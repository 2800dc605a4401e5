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
from typing import TYPE_CHECKING

from so8tqc.adapters.builder import Builder
from so8tqc.adapters.changed import Changed
from so8tqc.adapters.files import AdapterFiles, read_files
from so8tqc.adapters.methods.lora import ambiguous_alphas
from so8tqc.adapters.same_base import other_name, require_same_base
from so8tqc.adapters.settings import require_understood
from so8tqc.checkpoints.safetensors_index import Checkpoint
from so8tqc.errors import RotationError
from so8tqc.rotations.rotation_set import FloatArray, RotationSet

if TYPE_CHECKING:
    import torch

_SAYS_NOTHING = {"base_model_name_or_path", "revision", "inference_mode", "peft_version"}
"""Settings in which copies of an adapter may differ."""


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
        RotationError: an adapter is malformed, given twice, of another base, untrained, or changes
            what the base does not have or cannot hold.
        ShapeError: shapes disagree.
        ModelError: a tensor is stored in a dtype that cannot be baked.
    """
    builder = Builder(checkpoint, dtype, kept or {})
    read = [read_files(path) for path in paths]
    _refuse_twice(read)
    for files in read:
        require_understood(files)
        require_same_base(files, checkpoint)
        told = (other_name(files, checkpoint), ambiguous_alphas(files))
        builder.notices += (*files.notices, *(sentence for sentence in told if sentence))
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


def _refuse_twice(adapters: Sequence[AdapterFiles]) -> None:
    """Refuse an adapter that is given twice, perhaps as a copy: its effect would be doubled.

    Raises:
        RotationError: naming both.
    """
    for i, files in enumerate(adapters):
        for other in adapters[:i]:
            if _same(files, other):
                raise RotationError(
                    "this adapter is given twice"
                    + ("" if files.directory == other.directory else f", also as {other.directory}")
                    + ": its effect would be doubled",
                    where=str(files.directory),
                    remedy="Give it once. A stronger effect is a larger lora_alpha.",
                )


def _same(one: AdapterFiles, other: AdapterFiles) -> bool:
    """Whether two adapters have the same settings, and the same values for the same modules."""
    settings, theirs = (
        {k: v for k, v in files.config.items() if k not in _SAYS_NOTHING} for files in (one, other)
    )
    values, others = _values(one), _values(other)
    return (
        settings == theirs
        and values.keys() == others.keys()
        and all(values[key].equal(others[key]) for key in values)
    )


def _values(files: AdapterFiles) -> dict[tuple[str, str], torch.Tensor]:
    found = {
        (module, part): t for module, parts in files.parts.items() for part, t in parts.items()
    }
    found |= {("", name): tensor for name, tensor in files.whole.items()}
    return found


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
