"""The native gate file: safetensors with a header that leaves nothing to assume.

Keys are ``model.layers.{i}.self_attn.o_proj.theta`` (``….rotation`` for the parametrization
``matrix``), values [N, b, b]. Header metadata: ``so8t.format_version``,
``so8t.parametrization``, ``so8t.convention``, ``so8t.site``, ``so8t.block_size`` and
``so8t.pet`` (the PET record of the training as JSON, or ``none``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from so8tqc.artifacts import atomic_file
from so8tqc.errors import RotationError
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.raw import RawRotations
from so8tqc.rotations.rotation_set import Target

FORMAT_VERSION = "1"
_ATTENTION_OUTPUT = "self_attn.o_proj"
_KEY = re.compile(r"^model\.layers\.(\d+)\.(.+)\.(theta|rotation)$")
_Word = TypeVar("_Word", bound=StrEnum)


def write_native(
    path: Path,
    theta: Mapping[Target, npt.NDArray[np.floating]],
    *,
    parametrization: Parametrization,
    convention: Convention,
    site: Site,
    pet: Mapping[str, JsonValue] | None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a gate file, atomically.

    Args:
        path: where to.
        theta: target → [N, b, b], stored in its own dtype (float32 or float64).
        parametrization: how theta becomes R.
        convention: how the gate multiplies.
        site: where it sits.
        pet: the PET record of the training, None if it was trained without.
        metadata: further header entries.

    Raises:
        RotationError: no theta, or block sizes differ.
    """
    from safetensors.numpy import save_file

    sizes = {value.shape[-1] for value in theta.values()}
    if len(sizes) != 1:
        raise RotationError(f"one block size is needed, got {sorted(sizes)}", where=str(path))
    kind = "rotation" if parametrization is Parametrization.MATRIX else "theta"
    tensors = {
        f"model.layers.{t.layer}.{t.module or _ATTENTION_OUTPUT}.{kind}": np.ascontiguousarray(v)
        for t, v in theta.items()
    }
    header = {
        **(metadata or {}),
        "so8t.format_version": FORMAT_VERSION,
        "so8t.parametrization": str(parametrization),
        "so8t.convention": str(convention),
        "so8t.site": str(site),
        "so8t.block_size": str(sizes.pop()),
        "so8t.pet": "none" if pet is None else json.dumps(dict(pet), sort_keys=True),
    }
    with atomic_file(path) as temporary:
        save_file(tensors, str(temporary), metadata=header)


def read_native(path: Path) -> RawRotations:
    """Read a gate file.

    Raises:
        RotationError: not safetensors, a header entry is missing or unknown, or a key is
            none of a gate file's.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, npt.NDArray[np.float64]] = {}
    try:
        with safe_open(str(path), framework="pt") as handle:
            header: dict[str, str] = dict(handle.metadata() or {})
            for key in handle.keys():  # noqa: SIM118
                tensors[key] = handle.get_tensor(key).double().numpy()
    except (SafetensorError, OSError, ValueError) as error:
        raise RotationError(f"not a readable safetensors file: {error}", where=str(path)) from None
    version = header.get("so8t.format_version")
    if version != FORMAT_VERSION:
        raise RotationError(
            f"so8t.format_version is {version!r}, this version reads {FORMAT_VERSION!r}",
            where=str(path),
            remedy="Is this a gate file? A PEFT adapter is given as its directory.",
        )
    return RawRotations(
        theta=_targets(tensors, path),
        parametrization=_word(header, "so8t.parametrization", Parametrization, path),
        convention=_word(header, "so8t.convention", Convention, path),
        site=_word(header, "so8t.site", Site, path),
        metadata={k.removeprefix("so8t."): v for k, v in header.items()},
    )


def _targets(
    tensors: Mapping[str, npt.NDArray[np.float64]], path: Path
) -> dict[Target, npt.NDArray[np.float64]]:
    found: dict[Target, npt.NDArray[np.float64]] = {}
    for key, value in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise RotationError(
                f"unexpected key {key!r}; keys are model.layers.N.{_ATTENTION_OUTPUT}.theta",
                where=str(path),
            )
        module = None if match[2] == _ATTENTION_OUTPUT else match[2]
        found[Target(int(match[1]), module)] = value
    return found


def _word(header: Mapping[str, str], key: str, kind: type[_Word], path: Path) -> _Word:
    try:
        return kind(header[key])
    except (KeyError, ValueError):
        raise RotationError(
            f"header entry {key} is {header.get(key)!r}, expected one of "
            f"{', '.join(word.value for word in kind)}",
            where=str(path),
        ) from None
