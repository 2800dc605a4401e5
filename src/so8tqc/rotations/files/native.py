"""The native gate file: safetensors with a header that leaves nothing to assume.

Keys are ``model.layers.{i}.self_attn.o_proj.theta`` (``….rotation`` for the parametrization
``matrix``), values [N, b, b]. Header metadata: ``so8t.format_version``,
``so8t.parametrization``, ``so8t.convention``, ``so8t.site``, ``so8t.block_size`` and
``so8t.pet`` (the PET record of the training as JSON, or ``none``). A rotation in front of the
output head has the key ``lm_head.rotation`` (``.theta``), the site ``head``, and, where the gate
computes x + s·R·x, ``so8t.strength``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from so8tqc.disk.atomic import atomic_file
from so8tqc.disk.foreign import require_safetensors_header
from so8tqc.errors import RotationError
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.raw import RawRotations
from so8tqc.rotations.rotation_set import HEAD, Target

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = "1"
_ATTENTION_OUTPUT = "self_attn.o_proj"
_KEY = re.compile(r"^model\.layers\.(\d+)\.(.+)\.(theta|rotation)$")
_HEAD_KEY = re.compile(r"^lm_head\.(theta|rotation)$")
_STRENGTH = "so8t.strength"
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
    strength: float | None = None,
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
        strength: s of a rotation in front of the output head that computes x + s·R·x.

    Raises:
        RotationError: no theta, a value that is no float32 or float64 [N, b, b], block sizes
            that differ, or two values for one projection.
    """
    from safetensors.numpy import save_file

    tensors: dict[str, npt.NDArray[np.floating]] = {}
    for target, value in theta.items():
        _require_blocks(value, f"{path}, {target}")
        module = target.module or _ATTENTION_OUTPUT
        place = "lm_head" if target.is_head else f"model.layers.{target.layer}.{module}"
        key = f"{place}.{_key_ending(parametrization)}"
        if key in tensors:
            raise RotationError(f"two gates for {module}", where=f"{path}, layer {target.layer}")
        tensors[key] = np.ascontiguousarray(value)
    sizes = {value.shape[-1] for value in tensors.values()}
    if len(sizes) != 1:
        raise RotationError(f"one block size is needed, got {sorted(sizes)}", where=str(path))
    header = {
        **(metadata or {}),
        "so8t.format_version": FORMAT_VERSION,
        "so8t.parametrization": str(parametrization),
        "so8t.convention": str(convention),
        "so8t.site": str(site),
        "so8t.block_size": str(sizes.pop()),
        "so8t.pet": "none" if pet is None else json.dumps(dict(pet), sort_keys=True),
    }
    if strength is not None:
        header[_STRENGTH] = repr(strength)
    with atomic_file(path) as temporary:
        save_file(tensors, str(temporary), metadata=header)


def read_native(path: Path) -> RawRotations:
    """Read a gate file.

    Raises:
        RotationError: not safetensors; a header entry is missing, unknown or at odds with the
            tensors; a key is none of a gate file's; two gates for one projection.
    """
    from safetensors import SafetensorError, safe_open

    require_safetensors_header(path, RotationError)
    tensors: dict[str, npt.NDArray[np.float64]] = {}
    try:
        with safe_open(str(path), framework="pt") as handle:
            header: dict[str, str] = dict(handle.metadata() or {})
            for key in handle.keys():  # noqa: SIM118
                tensors[key] = _float64(handle.get_tensor(key), f"{path}, {key}")
    except (SafetensorError, OSError, ValueError) as error:
        raise RotationError(f"not a readable safetensors file: {error}", where=str(path)) from None
    version = header.get("so8t.format_version")
    if version != FORMAT_VERSION:
        raise RotationError(
            f"so8t.format_version is {version!r}, this version reads {FORMAT_VERSION!r}",
            where=str(path),
            remedy="Is this a gate file? A PEFT adapter is given as its directory.",
        )
    parametrization = _word(header, "so8t.parametrization", Parametrization, path)
    theta = _targets(tensors, parametrization, path)
    _check_block_size(header, theta, path)
    _check_pet(header, path)
    return RawRotations(
        theta=theta,
        parametrization=parametrization,
        convention=_word(header, "so8t.convention", Convention, path),
        site=_word(header, "so8t.site", Site, path),
        metadata={k.removeprefix("so8t."): v for k, v in header.items()},
        strength=_strength(header, theta, path),
    )


def is_native(path: Path) -> bool:
    """Whether a safetensors file has the header of a gate file; of one that cannot be read, True,
    so that :func:`read_native` says why."""
    from safetensors import SafetensorError, safe_open

    require_safetensors_header(path, RotationError)
    try:
        with safe_open(str(path), framework="np") as handle:
            return any(key.startswith("so8t.") for key in handle.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return True


def _key_ending(parametrization: Parametrization) -> str:
    return "rotation" if parametrization is Parametrization.MATRIX else "theta"


def _require_blocks(value: npt.NDArray[np.floating], where: str) -> None:
    if value.dtype not in (np.float32, np.float64):
        raise RotationError(f"theta is {value.dtype}, expected float32 or float64", where=where)
    if value.ndim != 3 or value.shape[1] != value.shape[2] or 0 in value.shape:
        raise RotationError(f"theta has shape {list(value.shape)}, expected [N, b, b]", where=where)


def _float64(tensor: torch.Tensor, where: str) -> npt.NDArray[np.float64]:
    if not tensor.is_floating_point():
        raise RotationError(f"dtype is {tensor.dtype}, expected a float", where=where)
    array: npt.NDArray[np.float64] = tensor.double().numpy()
    return array


def _targets(
    tensors: Mapping[str, npt.NDArray[np.float64]], parametrization: Parametrization, path: Path
) -> dict[Target, npt.NDArray[np.float64]]:
    ending = _key_ending(parametrization)
    found: dict[Target, npt.NDArray[np.float64]] = {}
    for key, value in tensors.items():
        match = _KEY.match(key) or _HEAD_KEY.match(key)
        if match is None:
            raise RotationError(
                f"unexpected key {key!r}; keys are model.layers.N.{_ATTENTION_OUTPUT}.{ending}",
                where=str(path),
            )
        if key.rsplit(".", 1)[1] != ending:
            raise RotationError(
                f"key {key!r} does not fit so8t.parametrization {parametrization}, whose keys "
                f"end with .{ending}",
                where=str(path),
                remedy="A .theta holds parameters, a .rotation holds the matrices themselves.",
            )
        if match.re is _HEAD_KEY:
            target = HEAD
        else:
            target = Target(int(match[1]), None if match[2] == _ATTENTION_OUTPUT else match[2])
        if target in found:
            raise RotationError(f"two gates for {target}", where=f"{path}, {key}")
        found[target] = value
    return found


def _strength(
    header: Mapping[str, str], theta: Mapping[Target, npt.NDArray[np.float64]], path: Path
) -> dict[Target, float]:
    if _STRENGTH not in header:
        return {}
    try:
        value = float(header[_STRENGTH])
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or HEAD not in theta:
        raise RotationError(
            f"header entry {_STRENGTH} is {header[_STRENGTH]!r}, expected a number, and a rotation "
            "in front of the output head that has it",
            where=str(path),
        )
    return {HEAD: value}


def _check_block_size(
    header: Mapping[str, str], theta: Mapping[Target, npt.NDArray[np.float64]], path: Path
) -> None:
    declared = header.get("so8t.block_size")
    for target, value in theta.items():
        if declared is not None and declared != str(value.shape[-1]):
            raise RotationError(
                f"header entry so8t.block_size is {declared!r}, but {target} has shape "
                f"{list(value.shape)}",
                where=str(path),
            )


def _check_pet(header: Mapping[str, str], path: Path) -> None:
    pet = header.get("so8t.pet", "none")
    try:
        if pet == "none" or isinstance(json.loads(pet), dict):
            return
    except (ValueError, RecursionError):
        pass
    raise RotationError(
        f"header entry so8t.pet is {pet[:40]!r}, expected a JSON object or 'none'", where=str(path)
    )


def _word(header: Mapping[str, str], key: str, kind: type[_Word], path: Path) -> _Word:
    try:
        return kind(header[key])
    except (KeyError, ValueError):
        raise RotationError(
            f"header entry {key} is {header.get(key)!r}, expected one of "
            f"{', '.join(word.value for word in kind)}",
            where=str(path),
        ) from None
