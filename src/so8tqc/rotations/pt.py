"""Checkpoints of the SO8T training code: ``.pt``, ``.pth``, ``.bin``. Data only, never code."""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from so8tqc.errors import RotationError
from so8tqc.rotations.raw import RawRotations
from so8tqc.rotations.rotation_set import FloatArray, Target
from so8tqc.rotations.towers import in_other_tower

_KEY = re.compile(
    r"^(?P<prefix>(?:.+\.)?)layers\.(?P<layer>\d+)\.(?:self_attn\.)?rotation_gate\.theta$"
)
_ANY_GATE = re.compile(r"(?:^|\.)rotation_gate\.")
_CONTAINERS = ("state_dict", "model_state_dict")
_NAMED = 3  # keys that a message lists
_DAMAGED = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, AssertionError, TypeError,
    AttributeError, struct.error,
)  # fmt: skip
"""What torch's reader raises on damaged files, found by mutating good ones."""


def read_pt(path: Path) -> RawRotations:
    """Read every ``layers.{i}[.self_attn].rotation_gate.theta`` of a checkpoint.

    Prefixes such as ``module.``, ``base_model.`` or ``model.`` may stand before; the keys
    may lie inside ``state_dict`` or ``model_state_dict``. Other entries of a gate, such as
    buffers, are not read; a notice names them.

    Raises:
        RotationError: unreadable; a pickle that asks for code; no gates; two for one layer;
            a gate elsewhere than at the attention of a text layer; a value that is no
            dense float tensor [N, b, b].
    """
    entries = list(_entries(_load(path)))
    theta: dict[Target, FloatArray] = {}
    others: list[str] = []
    for key, value in entries:
        match = _KEY.match(key)
        if match is None or in_other_tower(match["prefix"]):
            if key.endswith("rotation_gate.theta"):
                raise RotationError(
                    "a gate elsewhere than at the attention of a text layer, which cannot be baked",
                    where=f"{path}, {key}",
                )
            if _ANY_GATE.search(key):
                others.append(key)
            continue
        target = Target(int(match["layer"]))
        if target in theta:
            raise RotationError(f"two gates for layer {target.layer}", where=f"{path}, {key}")
        theta[target] = _array(value, f"{path}, {key}")
    if not theta:
        raise RotationError(
            "no rotation gates: no key ends with layers.N.rotation_gate.theta or "
            f"layers.N.self_attn.rotation_gate.theta (found {_some([k for k, _ in entries])})",
            where=str(path),
        )
    notices = (f"Gate entries that are not read: {_some(others)}.",) if others else ()
    return RawRotations(theta=theta, notices=notices)


def _some(keys: list[str]) -> str:
    """The first few keys, and how many more there are."""
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return (", ".join(keys[:_NAMED]) or "nothing") + more


def _load(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's message advises to switch the protection off; ours must not
        culprit = re.search(r"(?:GLOBAL|global) (\S+)", str(error))
        what = f" ({culprit[1]})" if culprit else ""
        raise RotationError(
            f"the file asks for code to be run{what}, or is no torch checkpoint; nothing was run",
            where=str(path),
            remedy="Save the state_dict alone, with torch.save(model.state_dict(), path).",
        ) from None
    except _DAMAGED as error:
        reason = str(error).strip().splitlines()
        raise RotationError(
            f"not a readable torch checkpoint: {reason[0] if reason else type(error).__name__}",
            where=str(path),
        ) from None


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Entries of the checkpoint and of the state dicts in it, one level down."""
    if not isinstance(content, Mapping):
        return
    for key, value in content.items():
        if key in _CONTAINERS and isinstance(value, Mapping):
            yield from ((str(k), v) for k, v in value.items())
        else:
            yield str(key), value


def _array(value: Any, where: str) -> FloatArray:
    import torch

    if not isinstance(value, torch.Tensor):
        raise RotationError(
            f"theta is {type(value).__name__}, expected a float tensor [N, 8, 8]", where=where
        )
    dense = value.layout is torch.strided and value.device.type == "cpu"
    if not dense or not value.is_floating_point() or value.ndim != 3:
        raise RotationError(
            f"theta is {list(value.shape)} of {value.dtype}, expected a float tensor [N, 8, 8]",
            where=where,
        )
    array: FloatArray = value.detach().double().numpy()
    return array
