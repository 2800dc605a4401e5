"""The rotations of a reference model."""

from __future__ import annotations

from pathlib import Path

from so8tqc.checkpoints.plan import widened
from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.errors import InputError
from so8tqc.gguf.file import is_gguf
from so8tqc.rotations.options import RotationOptions
from so8tqc.rotations.read import read_rotations
from so8tqc.rotations.rotation_set import RotationSet


def reference_rotations(
    base: Path, rotations: Path | None, options: RotationOptions
) -> RotationSet | None:
    """The rotations that make ``base`` the gated model; None if there are none.

    Raises:
        InputError: the base is a GGUF file, which cannot carry gates.
        RotationError: they are unusable or do not fit the base.
    """
    if rotations is None:
        return None
    if is_gguf(base):
        raise InputError(
            "rotations are applied to a model directory, not to a GGUF file", where=str(base)
        )
    return widened(read_rotations(rotations, options), open_checkpoint(base))
