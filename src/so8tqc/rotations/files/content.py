"""What a training saved, as tensors by their keys: torch files, safetensors, sharded directories.

Data only: nothing of it is run, and nothing is taken for a gate here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from so8tqc.disk.foreign import read_whole, require_plain_file, require_safetensors_header
from so8tqc.errors import RotationError
from so8tqc.rotations.files.peft_config import CONFIG_NAME, adapter_config
from so8tqc.rotations.files.pt import TORCH_SUFFIXES, load_torch, whole_tensor

if TYPE_CHECKING:
    import torch

CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
"""Entries under which trainers keep a model's state dict; they may lie in one another."""

_NO_MODEL = ("optim", "scheduler", "scaler", "rng", "config", "args", "ema_optim")
_DEEPEST = 8
"""Containers in containers that are followed."""

_SINGLE_FILES = (
    "model.safetensors",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "adapter_model.bin",
)
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Content:
    """What a file or directory holds.

    Attributes:
        entries: key → value; "" for a tensor that has no name.
        twice: keys that stand in two containers with different values.
        files: the files it was read from.
        file_of: key → name of its file.
        settings: numbers and flags of an adapter, by PEFT's words for them.
    """

    entries: Mapping[str, Any]
    twice: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    file_of: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_content(path: Path) -> Content:
    """Read a file, or all weight files of a directory.

    Raises:
        RotationError: missing, unreadable, a pickle that asks for code, or another kind of file.
    """
    return _directory(path) if path.is_dir() else _file(path)


def _file(path: Path) -> Content:
    require_plain_file(path, RotationError)
    if path.suffix == ".safetensors":
        tensors = _safetensors(path)
        settings = _settings_beside(path)
        return Content(tensors, (), (path,), dict.fromkeys(tensors, path.name), settings)
    if path.suffix in TORCH_SUFFIXES:
        loaded = load_torch(path)
        entries, twice = _flattened(loaded)
        settings = {**_adapter_settings(loaded), **_settings_beside(path)}
        return Content(entries, twice, (path,), dict.fromkeys(entries, path.name), settings)
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
            keys += _file(file).entries
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
    file_of: dict[str, str] = {}
    twice: list[str] = []
    settings: dict[str, Any] = {}
    for file in files:
        part = _file(file)
        twice += [*part.twice, *(key for key in part.entries if key in entries)]
        entries |= part.entries
        file_of |= part.file_of
        settings |= part.settings
    return Content(entries, tuple(twice), files, file_of, settings)


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
        raise RotationError(
            "no index of weights: 'weight_map' must map names to files", where=str(index)
        ) from None
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


def _settings_beside(file: Path) -> dict[str, Any]:
    """The configuration that lies beside an adapter's weights, {} beside other files."""
    if not file.name.startswith("adapter_model.") or not (file.parent / CONFIG_NAME).is_file():
        return {}
    return adapter_config(file.parent)


def _adapter_settings(content: object) -> dict[str, Any]:
    """What a checkpoint states of a LoRA, wherever in its dictionaries it does; of two different
    values of α neither."""
    words = ("lora_alpha", "use_rslora", "use_dora", "alpha_pattern", "rank_pattern")
    found: dict[str, Any] = {}
    for mapping in _mappings(content, lambda _key: True):
        for word in words:
            if word in mapping:
                differs = word in found and found[word] != mapping[word]
                found[word] = None if word == "lora_alpha" and differs else mapping[word]
    return found


def _walk(content: object, *, known: bool) -> Iterator[tuple[str, Any]]:
    """Every entry that is no container, breadth first."""
    for mapping in _mappings(content, lambda key: _is_container(key, known=known)):
        for key, value in mapping.items():
            if not isinstance(value, Mapping):
                yield str(key), value


def _mappings(content: object, enters: Callable[[str], bool]) -> Iterator[Mapping[Any, Any]]:
    """A mapping and those in it under keys that are entered, breadth first, each once."""
    level, seen = [content], {id(content)}
    for _ in range(_DEEPEST):
        inner: list[object] = []
        for mapping in level:
            if not isinstance(mapping, Mapping):
                continue
            yield mapping
            for key, value in mapping.items():
                if isinstance(value, Mapping) and id(value) not in seen and enters(str(key)):
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
