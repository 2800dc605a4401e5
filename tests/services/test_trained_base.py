"""What makes the reference the trained model: rotations that fit, on a model that carries them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from so8tqc.errors import InputError, RotationError
from so8tqc.rotations.enums import Convention
from so8tqc.rotations.options import RotationOptions
from so8tqc.rotations.read import read_rotations
from so8tqc.rotations.rotation_set import RotationSet
from so8tqc.services.trained_base import trained_base
from tiny_gguf import write_llama


def reference_rotations(
    base: Path, rotations: Path | None, options: RotationOptions, near: Path | None = None
) -> RotationSet | None:
    """The rotations of a base that needs no restoring."""
    with trained_base(base, rotations, options, near or base / "never") as trained:
        assert trained.directory == base
        return trained.rotation_set()


def test_without_rotations_the_base_is_the_reference(llama: Path) -> None:
    assert reference_rotations(llama, None, RotationOptions()) is None


def test_they_are_read_as_the_options_say(llama: Path, make_gates: Callable[..., Path]) -> None:
    gates = make_gates(llama)
    found = reference_rotations(llama, gates, RotationOptions(convention=Convention.ROW))
    assert found is not None
    assert found.convention is Convention.ROW
    plain = read_rotations(gates)
    assert plain.convention is Convention.COLUMN
    for target in plain:
        np.testing.assert_array_equal(found.blocks[target], plain.blocks[target])


def test_a_gguf_carries_no_gates(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    file = write_llama(tmp_path / "m.gguf")
    with pytest.raises(InputError, match="not to a GGUF file"):
        reference_rotations(file, make_gates(llama), RotationOptions())


def test_unusable_rotations_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RotationError):
        reference_rotations(llama, tmp_path / "absent.safetensors", RotationOptions())
