"""Configuration from flags, ``--set``, environment, file and defaults, in this order.

Every value keeps its origin, so that an error names the file, line and key it came from.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from so8tqc.errors import ConfigError

ENVIRONMENT_PREFIX = "SO8TQC_"
_MAX_BYTES = 1 << 20
_MAX_ALIASES = 64

Key = tuple[str | int, ...]
_Model = TypeVar("_Model", bound=BaseModel)


def load_options(
    model: type[_Model],
    *,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> _Model:
    """Build a config model; a value given at a higher place hides the lower ones.

    Args:
        model: which config.
        file: YAML file, or None.
        overrides: ``key.subkey=value`` of ``--set``; values are read as YAML.
        flags: field → value of the command line; absent flags must not be in it.
        environment: variables ``SO8TQC_KEY__SUBKEY``; others are ignored.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type; naming file, line and key.
    """
    values: dict[str, Any] = {}
    origins: dict[Key, str] = {}
    if file is not None:
        values, lines = read_yaml(file)
        origins |= {key: f"{file}:{line}" for key, line in lines.items()}
    for name, text in sorted((environment or {}).items()):
        if name.startswith(ENVIRONMENT_PREFIX):
            path = tuple(name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__"))
            if path[0] in model.model_fields:
                _put(values, path, _parse(text, name), origins, name)
    for override in overrides:
        name, separator, text = override.partition("=")
        where = f"--set {override}"
        if not separator or not name:
            raise ConfigError("expected KEY=VALUE", where=where)
        _put(values, tuple(name.split(".")), _parse(text, where), origins, where)
    for name, value in (flags or {}).items():
        _put(values, (name,), value, origins, f"--{name.replace('_', '-')}")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _config_error(error, model, origins, file) from None


def read_yaml(file: Path) -> tuple[dict[str, Any], dict[Key, int]]:
    """A YAML mapping as plain data, and the line (from 1) of every key.

    Raises:
        ConfigError: missing, larger than 1 MiB, not UTF-8, not YAML, a key given twice,
            too many aliases, or not a mapping.
    """
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ConfigError("larger than 1 MiB", where=str(file))
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("no such config file", where=str(file)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8: byte {error.start}", where=str(file)) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(file)) from None
    if text.count("*") > _MAX_ALIASES and sum(1 for _ in _aliases(text, file)) > _MAX_ALIASES:
        raise ConfigError(f"more than {_MAX_ALIASES} aliases", where=str(file))
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        what = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"not YAML: {what}", where=where) from None
    if values is None or root is None:
        return {}, {}
    if not isinstance(values, dict):
        raise ConfigError("expected a mapping of keys to values", where=str(file))
    return values, dict(_lines(root, (), file))


def _aliases(text: str, file: Path) -> Iterator[yaml.AliasEvent]:
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                yield event
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {error}", where=str(file)) from None


def _lines(node: yaml.Node, path: Key, file: Path) -> Iterator[tuple[Key, int]]:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise ConfigError(
                    f"key {key.value} is given twice", where=f"{file}:{key.start_mark.line + 1}"
                )
            seen.add(key.value)
            yield (*path, key.value), key.start_mark.line + 1
            yield from _lines(value, (*path, key.value), file)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield (*path, i), value.start_mark.line + 1
            yield from _lines(value, (*path, i), file)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{text!r} is not a YAML value", where=where) from None


def _put(
    values: dict[str, Any], path: tuple[str, ...], value: Any, origins: dict[Key, str], origin: str
) -> None:
    """Set a nested value and its origin."""
    inner = values
    for part in path[:-1]:
        if not isinstance(inner.get(part), dict):
            inner[part] = {}
        inner = inner[part]
    inner[path[-1]] = value
    origins[path] = origin


def _config_error(
    error: ValidationError, model: type[BaseModel], origins: Mapping[Key, str], file: Path | None
) -> ConfigError:
    """The first problem that pydantic found, in our words and with its place."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    key = tuple(first["loc"])
    name = ".".join(str(part) for part in key)
    where = _origin(key, origins) or (str(file) if file else None)
    remedy = None
    if first["type"] == "extra_forbidden":
        what = f"unknown key {name}"
        close = difflib.get_close_matches(str(key[-1]), _fields(model, key[:-1]), n=1)
        if close:
            remedy = f"Did you mean {close[0]}?"
    elif first["type"] == "missing":
        what = f"{name} is missing"
    else:
        message = first["msg"].removeprefix("Value error, ")
        given = "" if first["type"] == "value_error" and not key else f" (got {first['input']!r})"
        what = f"{name}: {message}{given}" if name else message
    return ConfigError(what, where=where, remedy=remedy)


def _origin(key: Key, origins: Mapping[Key, str]) -> str | None:
    """Where the key or its nearest parent was given."""
    for length in range(len(key), 0, -1):
        if key[:length] in origins:
            return origins[key[:length]]
    return None


def _fields(model: type[BaseModel], path: Key) -> list[str]:
    """Field names of the (nested) model at a path."""
    current: Any = model
    for part in path:
        field = current.model_fields.get(part) if hasattr(current, "model_fields") else None
        if field is None:
            return []
        current = field.annotation
    return list(getattr(current, "model_fields", {}))
