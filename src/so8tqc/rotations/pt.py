"""Checkpoints of the SO8T training code: ``.pt``, ``.pth``, ``.bin``. Data only, never code."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from so8tqc.errors import RotationError
from so8tqc.rotations.raw import RawRotations
from so8tqc.rotations.rotation_set import FloatArray, Target

_KEY = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:self_attn\.)?rotation_gate\.theta$")
_CONTAINERS = ("state_dict", "model_state_dict")


def read_pt(path: Path) -> RawRotations:
    """Read every ``layers.{i}[.self_attn].rotation_gate.theta`` of a checkpoint.

    Prefixes such as ``module.``, ``base_model.`` or ``model.`` may stand before; the keys
    may lie inside ``state_dict`` or ``model_state_dict``.

    Raises:
        RotationError: unreadable; a pickle that asks for code; no gates; two for one layer;
            a value that is no [N, b, b] tensor.
    """
    theta: dict[Target, FloatArray] = {}
    state = _state_dict(_load(path))
    for key, value in state.items():
        match = _KEY.search(str(key))
        if match is None:
            continue
        target = Target(int(match[1]))
        if target in theta:
            raise RotationError(f"two gates for layer {target.layer}", where=f"{path}, {key}")
        theta[target] = _array(value, f"{path}, {key}")
    if not theta:
        some = ", ".join(str(key) for key in list(state)[:3]) or "nothing"
        raise RotationError(
            "no rotation gates: no key ends with layers.N.rotation_gate.theta or "
            f"layers.N.self_attn.rotation_gate.theta (found {some})",
            where=str(path),
        )
    return RawRotations(theta=theta)


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
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()
        raise RotationError(
            f"not a readable torch checkpoint: {reason[0] if reason else type(error).__name__}",
            where=str(path),
        ) from None


def _state_dict(content: Any) -> Mapping[Any, Any]:
    if not isinstance(content, Mapping):
        return {}
    for name in _CONTAINERS:
        if isinstance(content.get(name), Mapping):
            return content[name]  # type: ignore[no-any-return]
    return content


def _array(value: Any, where: str) -> FloatArray:
    import torch

    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.ndim != 3:
        shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise RotationError(f"theta is {shape}, expected a float tensor [N, 8, 8]", where=where)
    array: FloatArray = value.detach().double().numpy()
    return array
