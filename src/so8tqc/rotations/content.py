"""What a training saved, as tensors by their keys: torch files, safetensors, sharded directories.

Data only: nothing of it is run, and nothing is taken for a gate here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from so8tqc.disk.foreign import read_whole, require_safetensors_header
from so8tqc.errors import RotationError
from so8tqc.rotations.pt import TORCH_SUFFIXES, load_torch, whole_tensor

if TYPE_CHECKING:
    import torch

CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
"""Entries under which trainers keep a model's state dict; they may lie in one another."""

_NO_MODEL = ("optim", "scheduler", "scaler", "rng", "config", "args", "ema_optim")
_DEEPEST = 8
"""Containers in containers that are followed."""

_SINGLE_FILES = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin",
                 "adapter_model.bin")  # fmt: skip
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Content:
    """What a file or directory holds.

    Attributes:
        entries: key → value; "" for a tensor that has no name.
        twice: keys that stand in two containers with different values.
        files: the files it was read from.
    """

    entries: Mapping[str, Any]
    twice: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


def read_content(path: Path) -> Content:
    """Read a file, or all weight files of a directory.

    Raises:
        RotationError: missing, unreadable, a pickle that asks for code, or another kind of file.
    """
    if path.is_dir():
        return _directory(path)
    if path.suffix == ".safetensors":
        return Content(_safetensors(path), files=(path,))
    if path.suffix in TORCH_SUFFIXES:
        entries, twice = _flattened(load_torch(path))
        return Content(entries, twice, (path,))
    raise RotationError(
        f"unknown kind of rotation file {path.suffix!r}",
        where=str(path),
        remedy="Give a .safetensors, .pt, .pth or .bin file, a PEFT adapter directory, or a model "
        "directory whose weights hold the gates.",
    )


def weight_keys(directory: Path) -> tuple[str, ...]:
    """The keys in a directory's weight files; of safetensors from their headers alone.

    Raises:
        RotationError: an unreadable file or index.
    """
    from safetensors import SafetensorError, safe_open

    keys: list[str] = []
    for file in _weight_files(directory):
        if file.suffix == ".safetensors":
            require_safetensors_header(file, RotationError)
            try:
                with safe_open(str(file), framework="np") as handle:
                    keys += handle.keys()
            except (SafetensorError, OSError) as error:
                raise _unreadable(file, error) from None
        else:
            keys += read_content(file).entries
    return tuple(keys)


def _directory(directory: Path) -> Content:
    files = _weight_files(directory)
    if not files:
        raise RotationError(
            "a directory without adapter_config.json is no PEFT adapter, and this one has no "
            "weights that could hold gates",
            where=str(directory),
        )
    entries: dict[str, Any] = {}
    twice: list[str] = []
    for file in files:
        part = read_content(file)
        twice += [*part.twice, *(key for key in part.entries if key in entries)]
        entries |= part.entries
    return Content(entries, tuple(twice), files)


def _weight_files(directory: Path) -> tuple[Path, ...]:
    """The files of a sharded or single checkpoint, by its index or by the usual names."""
    for name in _INDICES:
        if (directory / name).is_file():
            return _indexed(directory / name)
    for name in _SINGLE_FILES:
        if (directory / name).is_file():
            return (directory / name,)
    endings = (".safetensors", *TORCH_SUFFIXES)
    for ending in endings:
        if found := sorted(directory.glob(f"*{ending}")):
            return tuple(found)
    return ()


def _indexed(index: Path) -> tuple[Path, ...]:
    content = read_whole(index, RotationError)
    try:
        mapping = json.loads(content.decode("utf-8"))["weight_map"]
        names = sorted({str(name) for name in mapping.values()})
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise RotationError("no index of weights: 'weight_map' must map names to files",
                            where=str(index)) from None  # fmt: skip
    for name in names:
        if Path(name).name != name or name in (".", ".."):
            raise RotationError(
                f"the index names {name[:80]!r}, which is outside the directory", where=str(index)
            )
    return tuple(index.parent / name for name in names)


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    require_safetensors_header(path, RotationError)
    try:
        with safe_open(str(path), framework="pt") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, AttributeError, RuntimeError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> RotationError:
    return RotationError(f"not a readable safetensors file: {error}", where=str(path))


def _flattened(content: object) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Entries of a checkpoint and of the containers in it, by their own keys.

    The known containers are followed first; others only where these hold no tensor.
    """
    import torch

    if isinstance(content, torch.Tensor):
        return {"": whole_tensor(content)}, ()
    if isinstance(content, Sequence) and content and all(_is_tensor(v) for v in content):
        return {f"layer_{i}": whole_tensor(value) for i, value in enumerate(content)}, ()
    entries: dict[str, Any] = {}
    twice: list[str] = []
    for known in (True, False):
        for key, value in _walk(content, known=known):
            if key in entries and entries[key] is not value:
                twice.append(key)
            entries.setdefault(key, value)
        if any(_is_tensor(value) for value in entries.values()):
            break
    return {key: whole_tensor(value) for key, value in entries.items()}, tuple(twice)


def _walk(content: object, *, known: bool) -> Iterator[tuple[str, Any]]:
    """Every entry that is no container, breadth first, each container once."""
    level, seen = [content], {id(content)}
    for _ in range(_DEEPEST):
        inner: list[object] = []
        for mapping in level:
            if not isinstance(mapping, Mapping):
                continue
            for key, value in mapping.items():
                if not isinstance(value, Mapping):
                    yield str(key), value
                elif id(value) not in seen and _is_container(str(key), known=known):
                    seen.add(id(value))
                    inner.append(value)
        level = inner


def _is_container(key: str, *, known: bool) -> bool:
    if known:
        return key in CONTAINERS
    return not any(word in key.lower() for word in _NO_MODEL)


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)
