"""A YAML file as plain data, with the line of every key.

What a hostile file would cost is counted before anything is built from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from so8tqc.errors import ConfigError

_MAX_BYTES = 1 << 20
_MAX_VALUES = 10_000
"""Values of a file, aliases expanded: forty short lines of aliases can stand for 2^40 values."""

_MAX_DIGITS = 100
"""Characters of a number: to convert a million digits takes minutes."""

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")

Key = tuple[str, ...]


def read_yaml(file: Path) -> tuple[dict[str, Any], dict[Key, int]]:
    """A YAML mapping as plain data, and the line (from 1) of every key.

    Raises:
        ConfigError: missing, larger than 1 MiB, not UTF-8, not YAML, a key given twice, an
            alias inside itself, more than 10,000 values, or not a mapping.
    """
    try:
        with file.open("rb") as stream:  # which may be a pipe, and then has no size
            content = stream.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError("larger than 1 MiB", where=str(file))
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise ConfigError("no such config file", where=str(file)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8: byte {error.start}", where=str(file)) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(file)) from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        # before anything is built from them: what is counted here is what a reader would walk
        lines = {} if root is None else dict(_lines(root, (), file))
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        what = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"not YAML: {' '.join(what.split())}", where=where) from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise ConfigError("expected a mapping of keys to values", where=str(file))
    return values, lines


def _lines(root: yaml.Node, path: Key, file: Path) -> Iterator[tuple[Key, int]]:
    """The line of every key and list item, aliases expanded."""
    count = 0
    open_nodes: set[int] = set()

    def walk(node: yaml.Node, path: Key) -> Iterator[tuple[Key, int]]:
        nonlocal count
        count += 1
        where = f"{file}:{node.start_mark.line + 1}"
        if count > _MAX_VALUES:
            raise ConfigError(f"more than {_MAX_VALUES:,} values, aliases expanded", where=where)
        if id(node) in open_nodes:
            raise ConfigError("an alias stands inside what it names", where=where)
        if len(node.value) > _MAX_DIGITS and node.tag in _NUMBERS:
            raise ConfigError(f"a number of {len(node.value):,} characters", where=where)
        open_nodes.add(id(node))
        if isinstance(node, yaml.MappingNode):
            _refuse_repeated_keys(node, file)
            for key, value in node.value:
                yield (*path, str(key.value)), key.start_mark.line + 1
                yield from walk(value, (*path, str(key.value)))
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                yield (*path, str(i)), value.start_mark.line + 1
                yield from walk(value, (*path, str(i)))
        open_nodes.remove(id(node))

    return walk(root, path)


def _refuse_repeated_keys(node: yaml.MappingNode, file: Path) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        name = str(key.value)
        if name in seen:
            raise ConfigError(
                f"key {name} is given twice", where=f"{file}:{key.start_mark.line + 1}"
            )
        seen.add(name)
