"""The values in force, each with where it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from so8tqc.config.batch import Batch, load_runs
from so8tqc.config.load import given_values, origin_of, placeholders, put, validated
from so8tqc.config.matrix import MATRIX
from so8tqc.config.stages import RunConfig, nested_model
from so8tqc.config.yaml_file import Key

DEFAULT = "default"
NOT_GIVEN = "not given"


class Setting(NamedTuple):
    """One value in force.

    Attributes:
        key: its name, dotted.
        value: as JSON holds it.
        origin: ``command line``, ``--set KEY=VALUE``, the variable's name, ``FILE:LINE``,
            ``default``, ``not given`` for what has no default, or ``matrix`` for what every
            combination has a value of its own for.
        combination: name of the combination that has it; "" for a value that all share.
    """

    key: str
    value: Any
    origin: str
    combination: str = ""


def settings(
    model: type[BaseModel],
    *,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[Setting, ...]:
    """Every option of a model with its value and its origin, in the order of the model.

    Of a run file with a matrix what all combinations share, then what each is given.

    Arguments as of :func:`so8tqc.config.load.load_options`.

    Raises:
        ConfigError: what load_options refuses, but for a required key that is missing.
    """
    given, origins = given_values(
        model, file=file, overrides=overrides, flags=flags, environment=environment
    )
    if model is RunConfig and MATRIX in given:
        runs = load_runs(file=file, overrides=overrides, flags=flags, environment=environment)
        assert isinstance(runs, Batch)  # there is a matrix
        return _of_batch(runs, given, origins, file)
    stand_ins = {key: value for key, value in placeholders(model).items() if key not in given}
    config = validated(model, {**stand_ins, **given}, origins, file)
    return tuple(
        row._replace(value=None, origin=NOT_GIVEN) if row.key in stand_ins else row
        for row in _walk(model, config.model_dump(mode="json"), given, origins, ())
    )


def _of_batch(
    batch: Batch, given: Mapping[str, Any], origins: Mapping[Key, str], file: Path | None
) -> tuple[Setting, ...]:
    first, *others = batch.combinations
    everywhere = [key for key in first.values if all(key in other.values for other in others)]
    common = {key: deepcopy(value) for key, value in given.items() if key != MATRIX}
    found = dict(origins)
    for key in everywhere:
        put(common, tuple(key.split(".")), first.values[key], found, MATRIX)
    config = validated(RunConfig, common, found, file)
    rows = [
        row._replace(value=None) if row.key in everywhere else row
        for row in _walk(RunConfig, config.model_dump(mode="json"), common, found, ())
    ]
    for combination in batch.combinations:
        rows += [
            Setting(key, value, combination.origins[key], combination.name)
            for key, value in combination.values.items()
        ]
    return tuple(rows)


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
