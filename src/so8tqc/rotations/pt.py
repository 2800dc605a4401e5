"""Checkpoints of the SO8T training code: ``.pt``, ``.pth``, ``.bin``. Data only, never code."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from so8tqc.disk.foreign import require_plain_file
from so8tqc.errors import RotationError
from so8tqc.rotations.pickle_scan import CostlyPickleError, scan_legacy, scan_pickle
from so8tqc.rotations.raw import RawRotations
from so8tqc.rotations.rotation_set import FloatArray, Target
from so8tqc.rotations.towers import in_other_tower

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
"""Endings of the files that a torch checkpoint of gates may have."""

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
        RotationError: unreadable; a pickle that asks for code, or for more memory than its bytes;
            no gates; two for one layer; a gate elsewhere than at the attention of a text layer; a
            value that is no dense float tensor [N, b, b] of its own numbers.
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

    _refuse_costly(path)
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


def _refuse_costly(path: Path) -> None:
    """Refuse what would take far more memory or time to load than the file is large."""
    size = require_plain_file(path, RotationError)
    try:
        with path.open("rb") as stream:
            if not zipfile.is_zipfile(stream):
                stream.seek(0)
                scan_legacy(stream)
                return
            with zipfile.ZipFile(stream) as archive:
                _scan_members(archive, size)
    except CostlyPickleError as error:
        raise RotationError(
            f"no checkpoint of gates: {error}",
            where=str(path),
            remedy="Save the state_dict alone, with torch.save(model.state_dict(), path).",
        ) from None
    except (OSError, *_DAMAGED, zipfile.BadZipFile):
        return  # torch says what is wrong with it


def _scan_members(archive: zipfile.ZipFile, size: int) -> None:
    """torch stores members as they are, so that they take no more room than the file."""
    members = archive.infolist()
    packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if packed or sum(member.file_size for member in members) > size:
        raise CostlyPickleError("it is packed, which torch.save does not do")
    for member in members:
        if member.filename.endswith("data.pkl"):
            with archive.open(member) as stream:
                scan_pickle(stream)


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
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise RotationError(
            f"theta is {list(value.shape)}, of which most elements share their memory",
            where=where,
            remedy="Save theta.contiguous().",
        )
    array: FloatArray = value.detach().double().numpy()
    return array
