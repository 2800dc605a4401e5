"""Configuration from flags, ``--set``, environment, file and defaults, in this order.

Every value keeps its origin, so that an error names the file, line and key it came from.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from so8tqc.config.environment import environment_values
from so8tqc.config.extends import read_layers
from so8tqc.config.matrix import MATRIX
from so8tqc.config.stages import nested_model
from so8tqc.config.yaml_file import Key
from so8tqc.errors import ConfigError

_SHOWN_CHARACTERS = 60
COMMAND_LINE = "command line"

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
        file: YAML file, with what it ``extends``; or None.
        overrides: ``key.subkey=value`` of ``--set``; values are read as YAML.
        flags: field → value of the command line; absent flags must not be in it. A mapping
            changes the keys it names and leaves its neighbours.
        environment: variables, see :mod:`so8tqc.config.environment`.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type; naming file, line and key.
    """
    values, origins = given_values(
        model, file=file, overrides=overrides, flags=flags, environment=environment
    )
    return validated(model, values, origins, file)


def placeholders(model: type[BaseModel]) -> dict[str, Any]:
    """Something valid for every field without a default: each is a path, or a list of them."""
    required = {name: field for name, field in model.model_fields.items() if field.is_required()}
    return {
        name: ["."] if get_origin(field.annotation) is tuple else "."
        for name, field in required.items()
    }


def given_values(
    model: type[BaseModel],
    *,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], dict[Key, str]]:
    """What was given, merged but not validated, and where each key of it came from.

    Arguments as of :func:`load_options`.

    Raises:
        ConfigError: unreadable file, or a value that is not YAML.
    """
    values: dict[str, Any] = {}
    origins: dict[Key, str] = {}
    if file is not None:
        values, origins = read_layers(file)
    for path, text, name in environment_values(model, environment or {}):
        put(values, path, _parse(text, name), origins, name)
    for override in overrides:
        name, separator, text = override.partition("=")
        where = f"--set {override}"
        if not separator or not name:
            raise ConfigError("expected KEY=VALUE", where=where)
        put(values, _override_path(name), _parse(text, where), origins, where)
    for path, value in _leaves(flags or {}):
        put(values, path, value, origins, COMMAND_LINE)
    return values, origins


def validated(
    model: type[_Model], values: Mapping[str, Any], origins: Mapping[Key, str], file: Path | None
) -> _Model:
    """The model of these values.

    Raises:
        ConfigError: unknown or missing key, wrong type; naming file, line and key.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _config_error(error, model, origins, file) from None


def _leaves(flags: Mapping[str, object], path: Key = ()) -> Iterator[tuple[Key, object]]:
    for name, value in flags.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _override_path(name: str) -> Key:
    """The keys of a dotted name; the axes of a matrix are dotted themselves."""
    first, separator, rest = name.partition(".")
    return (first, rest) if separator and first == MATRIX else tuple(name.split("."))


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        raise ConfigError(f"{text!r} is not a YAML value", where=where) from None


def put(
    values: dict[str, Any], path: Key, value: Any, origins: dict[Key, str], origin: str
) -> None:
    """Set a nested value and its origin; values that it hides lose theirs."""
    inner = values
    for part in path[:-1]:
        if not isinstance(inner.get(part), dict):
            inner[part] = {}
        inner = inner[part]
    inner[path[-1]] = value
    for hidden in [key for key in origins if key[: len(path)] == path]:
        del origins[hidden]
    origins[path] = origin


def _config_error(
    error: ValidationError, model: type[BaseModel], origins: Mapping[Key, str], file: Path | None
) -> ConfigError:
    """What pydantic found, in our words and with its place; the others are named after it."""
    # a wrong name is the likely cause of "missing" elsewhere, so it is told first
    problems = sorted(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
    place = str(file) if file else None
    first, *others = (
        (_message(p["type"], _key(p["loc"]), p["msg"], p["input"]), _key(p["loc"]))
        for p in problems
    )
    remedies = []
    if problems[0]["type"] == "extra_forbidden":
        *parents, name = first[1]
        close = difflib.get_close_matches(name, _fields(model, tuple(parents)), n=1)
        remedies += [f"Did you mean {close[0]}?"] if close else []
    if others:
        listed = "; ".join(f"{origin_of(key, origins) or place}: {text}" for text, key in others)
        remedies.append(f"Also: {listed}.")
    return ConfigError(
        first[0], where=origin_of(first[1], origins) or place, remedy=" ".join(remedies) or None
    )


def _message(kind: str, key: Key, message: str, given: object) -> str:
    name = ".".join(key)
    if kind == "extra_forbidden":
        return f"unknown key {name}"
    if kind == "missing":
        return f"key {name} is missing"
    text = message.removeprefix("Value error, ")
    if kind != "value_error":  # ours already say what was given
        shown = repr(given)
        cut = shown[:_SHOWN_CHARACTERS] + "…" if len(shown) > _SHOWN_CHARACTERS else shown
        text += f" (got {cut})"
    return f"key {name}: {text}" if name else text


def _key(location: Sequence[str | int]) -> Key:
    """pydantic's location as a path of keys; ``[key]`` marks a fault of the key itself."""
    return tuple(str(part) for part in location if part != "[key]")


def origin_of(key: Key, origins: Mapping[Key, str]) -> str | None:
    """Where the key was given: itself, its nearest parent, or what was set inside it."""
    for length in range(len(key), 0, -1):
        if key[:length] in origins:
            return origins[key[:length]]
    return next((origin for path, origin in origins.items() if path[: len(key)] == key), None)


def _fields(model: type[BaseModel], path: Key) -> list[str]:
    """Field names of the (nested) model at a path."""
    for part in path:
        field = model.model_fields.get(part)
        inner = nested_model(field) if field else None
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)
