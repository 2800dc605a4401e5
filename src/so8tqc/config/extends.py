"""``extends:``: a config file on top of others. Mappings are merged, everything else replaced."""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath
from typing import Any

from so8tqc.config.yaml_file import Key, read_yaml
from so8tqc.errors import ConfigError

EXTENDS = "extends"
_MAX_FILES = 32
"""Files read for one config: a few that each extend the next twice could stand for millions."""

Layer = tuple[dict[str, Any], dict[Key, str]]


def read_layers(file: Path) -> Layer:
    """The values of a file on top of those it extends, and the ``FILE:LINE`` of every key.

    ``extends`` is one path or a list, relative to the file that says so; later ones hide
    earlier ones, and the file hides them all.

    Raises:
        ConfigError: as :func:`so8tqc.config.yaml_file.read_yaml` for any of the files; a path that
            is absolute, a URL or no plain file; a cycle; more than 32 files.
    """
    return _read(file, (), [])


def _read(file: Path, chain: tuple[Path, ...], read: list[Path]) -> Layer:
    values, lines = read_yaml(file)
    origins = {key: f"{file}:{line}" for key, line in lines.items() if key[0] != EXTENDS}
    if EXTENDS not in values:
        return values, origins
    where = f"{file}:{lines[(EXTENDS,)]}" if (EXTENDS,) in lines else str(file)
    chain = (*chain, file)
    merged: Layer = ({}, {})
    for text in _listed(values.pop(EXTENDS), where):
        base = _plain_file(text, file, where)
        if os.path.realpath(base) in map(os.path.realpath, chain):
            shown = " → ".join(str(link) for link in (*chain, base))
            raise ConfigError(f"extends itself: {shown}", where=where)
        read.append(base)
        if len(read) > _MAX_FILES:
            raise ConfigError(f"extends more than {_MAX_FILES} files", where=where)
        merged = _on_top(merged, _read(base, chain, read))
    return _on_top(merged, (values, origins))


def _listed(value: object, where: str) -> list[str]:
    listed = value if isinstance(value, list) else [value]
    texts = [text for text in listed if isinstance(text, str) and text]
    if len(texts) != len(listed):
        raise ConfigError(f"{EXTENDS}: expected a path or a list of paths", where=where)
    return texts


def _plain_file(text: str, file: Path, where: str) -> Path:
    if "://" in text or Path(text).is_absolute() or PureWindowsPath(text).drive:
        raise ConfigError(f"{EXTENDS}: {text} is not relative to this file", where=where)
    path = file.parent / text
    try:
        plain = path.is_file()
    except OSError:  # such as a name that is too long
        plain = False
    if not plain:
        raise ConfigError(f"{EXTENDS}: no such file as {path}", where=where)
    return path


def _on_top(low: Layer, high: Layer) -> Layer:
    replaced: set[Key] = set()
    values = _merged(low[0], high[0], (), replaced)
    kept = {
        key: origin
        for key, origin in low[1].items()
        if not any(key[:length] in replaced for length in range(1, len(key) + 1))
    }
    return values, kept | high[1]


def _merged(
    low: dict[str, Any], high: dict[str, Any], path: Key, replaced: set[Key]
) -> dict[str, Any]:
    merged = dict(low)
    for name, value in high.items():
        key = (*path, str(name))
        if isinstance(value, dict) and isinstance(low.get(name), dict):
            merged[name] = _merged(low[name], value, key, replaced)
        else:
            merged[name] = value
            replaced.add(key)
    return merged
