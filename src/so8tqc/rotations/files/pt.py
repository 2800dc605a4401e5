"""torch's files, ``.pt``, ``.pth``, ``.bin``: data only, never code."""

from __future__ import annotations

import logging
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from so8tqc.disk.foreign import require_plain_file
from so8tqc.errors import RotationError
from so8tqc.rotations.files.pickle_scan import CostlyPickleError, scan_legacy, scan_pickle
from so8tqc.rotations.rotation_set import FloatArray

if TYPE_CHECKING:
    import torch

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
"""Endings of the files that a torch checkpoint of gates may have."""

_DAMAGED = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AssertionError,
    TypeError,
    AttributeError,
    struct.error,
)
"""What torch's reader raises on damaged files, found by mutating good ones."""


def load_torch(path: Path) -> Any:
    """Load a checkpoint as data.

    Files of ``DTensor``s are read without any process group: torch allows these classes once its
    module of them is imported. A zip file is mapped, so that only what is used is read.

    Raises:
        RotationError: unreadable; a pickle that asks for code, or for more memory than its bytes.
    """
    zipped = _refuse_costly(path)
    try:
        try:
            return _loaded(path, zipped)
        except pickle.UnpicklingError as error:
            if "torch.distributed" not in str(error):
                raise
            import torch.distributed.tensor  # noqa: F401

            # it warns that no process group exists: none is needed to read
            logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
            return _loaded(path, zipped)
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


def _loaded(path: Path, zipped: bool) -> Any:
    import torch

    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _refuse_costly(path: Path) -> bool:
    """Refuse what would take far more memory or time to load than the file is large; whether the
    file is a zip file."""
    size = require_plain_file(path, RotationError)
    try:
        with path.open("rb") as stream:
            if not zipfile.is_zipfile(stream):
                stream.seek(0)
                scan_legacy(stream)
                return False
            with zipfile.ZipFile(stream) as archive:
                _scan_members(archive, size)
                return True
    except CostlyPickleError as error:
        raise RotationError(
            f"no checkpoint of gates: {error}",
            where=str(path),
            remedy="Save the state_dict alone, with torch.save(model.state_dict(), path).",
        ) from None
    except (OSError, *_DAMAGED, zipfile.BadZipFile):
        return False  # torch says what is wrong with it


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


def whole_tensor(value: Any) -> Any:
    """The tensor of a ``DTensor`` that this process has whole; any other value as it is.

    A rank's share stays a ``DTensor``: :func:`theta_array` refuses it.
    """
    local = getattr(value, "_local_tensor", None)
    return local if local is not None and local.shape == value.shape else value


def theta_array(value: Any, where: str, ndim: int = 3) -> FloatArray:
    """A gate's parameters as float64: [N, b, b], or the [D, D] of a single block.

    Raises:
        RotationError: no dense float tensor of its own numbers, or one rank's share of one.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        raise RotationError(
            f"theta is {type(value).__name__}, expected a float tensor [N, 8, 8]", where=where
        )
    require_whole(value, where)
    dense = value.layout is torch.strided and value.device.type == "cpu"
    if not dense or not value.is_floating_point() or value.ndim != ndim:
        raise RotationError(
            f"theta is {list(value.shape)} of {value.dtype}, expected a float tensor "
            f"{'[N, 8, 8]' if ndim == 3 else '[D, D]'}",
            where=where,
        )
    require_own_memory(value, where)
    array: FloatArray = value.detach().double().numpy()
    return array


def require_whole(value: torch.Tensor, where: str) -> None:
    """Refuse a tensor of which the file holds only one rank's share.

    Raises:
        RotationError: it does.
    """
    local = getattr(value, "_local_tensor", None)
    if local is not None:
        raise RotationError(
            f"the file holds one rank's share, {list(local.shape)} of {list(value.shape)}",
            where=where,
            remedy="Gather the state dict before saving: full_tensor(), or full_state_dict=True.",
        )


def require_own_memory(value: torch.Tensor, where: str) -> None:
    """Refuse a tensor that is larger than what is stored of it.

    Raises:
        RotationError: most of its elements share their memory.
    """
    require_whole(value, where)
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise RotationError(
            f"the tensor is {list(value.shape)}, of which most elements share their memory",
            where=where,
            remedy="Save it as tensor.contiguous().",
        )
