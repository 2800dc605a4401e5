"""The values in force, each with where it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from so8tqc.config import nested_model
from so8tqc.config_file import given_values, origin_of, placeholders, validated
from so8tqc.config_yaml import Key

DEFAULT = "default"
NOT_GIVEN = "not given"


class Setting(NamedTuple):
    """One value in force.

    Attributes:
        key: its name, dotted.
        value: as JSON holds it.
        origin: ``command line``, ``--set KEY=VALUE``, the variable's name, ``FILE:LINE``,
            ``default``, or ``not given`` for what has no default.
    """

    key: str
    value: Any
    origin: str


def settings(
    model: type[BaseModel],
    *,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[Setting, ...]:
    """Every option of a model with its value and its origin, in the order of the model.

    Arguments as of :func:`so8tqc.config_file.load_options`.

    Raises:
        ConfigError: what load_options refuses, but for a required key that is missing.
    """
    given, origins = given_values(
        model, file=file, overrides=overrides, flags=flags, environment=environment
    )
    stand_ins = {key: value for key, value in placeholders(model).items() if key not in given}
    config = validated(model, {**stand_ins, **given}, origins, file)
    return tuple(
        Setting(key, None, NOT_GIVEN) if key in stand_ins else Setting(key, value, origin)
        for key, value, origin in _walk(model, config.model_dump(mode="json"), given, origins, ())
    )


def _walk(
    model: type[BaseModel],
    values: Mapping[str, Any],
    given: Mapping[str, Any],
    origins: Mapping[Key, str],
    path: Key,
) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        key = (*path, name)
        if inner := nested_model(field):
            yield from _walk(inner, values[name], given.get(name, {}), origins, key)
        else:
            origin = origin_of(key, origins) if name in given else None
            yield Setting(".".join(key), values[name], origin or DEFAULT)
