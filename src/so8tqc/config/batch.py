"""The runs that a run file describes: one, or with a ``matrix:`` one for each combination."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from so8tqc.config.load import given_values, origin_of, placeholders, put, validated
from so8tqc.config.matrix import INCLUDE, MATRIX, check_matrix, expand, names_of
from so8tqc.config.stages import RunConfig, config_model
from so8tqc.config.yaml_file import Key
from so8tqc.errors import ConfigError


@dataclass(frozen=True)
class Combination:
    """One run of a batch.

    Attributes:
        name: of its directory inside the batch's.
        values: what the matrix gives it, dotted key → value.
        origins: where each of these was given.
        config: the run.
    """

    name: str
    values: Mapping[str, Any]
    origins: Mapping[str, str]
    config: RunConfig


@dataclass(frozen=True)
class Batch:
    """The runs of a matrix, in its order, and the directory they share."""

    out: Path
    combinations: tuple[Combination, ...]


def load_runs(
    *,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> RunConfig | Batch:
    """A run file as one run, or as a batch if it has a matrix.

    Arguments as of :func:`so8tqc.config.load.load_options`.

    Raises:
        ConfigError: as there; a faulty matrix; or an option given by a flag, ``--set`` or the
            environment although the matrix varies it.
    """
    values, origins = given_values(
        RunConfig, file=file, overrides=overrides, flags=flags, environment=environment
    )
    if MATRIX not in values:
        return validated(RunConfig, values, origins, file)
    in_file = {} if file is None else given_values(RunConfig, file=file)[1]
    return batch_of(values, origins, file, frozenset(in_file.values()))


def check_file(file: Path, command: str | None = None) -> None:
    """Validate a run file with its matrix, or what a command's ``--config`` reads, by itself.

    A command's file may leave out what its flags give: no path has to be in it.

    Raises:
        ConfigError: as :func:`load_runs`; or no such command.
    """
    if command is None:
        load_runs(file=file)
        return
    model = config_model(command)
    values, origins = given_values(model, file=file)
    validated(model, {**placeholders(model), **values}, origins, file)


def batch_of(
    values: Mapping[str, Any],
    origins: Mapping[Key, str],
    file: Path | None,
    in_file: frozenset[str],
) -> Batch:
    """The batch of values that have a matrix.

    Args:
        values, origins: of :func:`so8tqc.config.load.given_values`.
        file: for messages.
        in_file: the origins that lie in files: what the matrix may hide.

    Raises:
        ConfigError: see :func:`load_runs`.
    """
    matrix = _checked(values[MATRIX], origins, file)
    common = {key: value for key, value in values.items() if key != MATRIX}
    outside = {key: origin for key, origin in origins.items() if key[0] != MATRIX}
    expanded = expand(matrix)
    _refuse_hidden(expanded, common, outside, in_file)
    out = Path(str(common.get("out", RunConfig.model_fields["out"].default)))
    made: list[Combination] = []
    wrong: dict[str, ConfigError] = {}
    for name, chosen in zip(names_of(expanded), expanded, strict=True):
        places = {key: _place(key, value, matrix, origins) for key, value in chosen.items()}
        own, found = deepcopy(common), dict(outside)
        for key, value in chosen.items():
            put(own, tuple(key.split(".")), value, found, places[key])
        own["out"] = out / name
        try:
            config = validated(RunConfig, own, found, file)
        except ConfigError as error:
            wrong[name] = error
        else:
            made.append(Combination(name, chosen, places, config))
    if wrong:
        raise _together(wrong, len(expanded), file)
    return Batch(out, tuple(made))


def _checked(matrix: object, origins: Mapping[Key, str], file: Path | None) -> Mapping[str, Any]:
    try:
        return check_matrix(matrix)
    except ConfigError as error:
        # the message begins "key matrix.…" or "unknown key matrix.…"
        named = error.what.removeprefix("unknown ").removeprefix("key ").partition(":")[0]
        key = next((k for k in origins if ".".join(k) == named), (MATRIX,))
        where = origin_of(key, origins) or (str(file) if file else None)
        raise ConfigError(error.what, where=where, remedy=error.remedy) from None


def _refuse_hidden(
    combinations: Sequence[Mapping[str, Any]],
    common: Mapping[str, Any],
    origins: Mapping[Key, str],
    in_file: frozenset[str],
) -> None:
    """A flag that a matrix would hide did nothing, and said nothing."""
    for key in dict.fromkeys(key for combination in combinations for key in combination):
        path = tuple(key.split("."))
        inner: Any = common
        for part in path:
            inner = inner.get(part) if isinstance(inner, Mapping) else None
        origin = origin_of(path, origins)
        if inner is not None and origin is not None and origin not in in_file:
            raise ConfigError(
                f"the matrix gives {key}, which this would not change",
                where=origin,
                remedy=f"Change the matrix: --set '{MATRIX}.{key}=[…]'.",
            )


def _place(key: str, value: object, matrix: Mapping[str, Any], origins: Mapping[Key, str]) -> str:
    """Where a value of a combination stands in the matrix."""
    if key in matrix and value in matrix[key]:
        path: Key = (MATRIX, key, str(matrix[key].index(value)))
    else:
        entries = matrix.get(INCLUDE, [])
        i = next(i for i, entry in enumerate(entries) if entry.get(key) == value)
        path = (MATRIX, INCLUDE, str(i), key)
    return origin_of(path, origins) or MATRIX


def _together(wrong: Mapping[str, ConfigError], total: int, file: Path | None) -> ConfigError:
    """One error for all combinations; what they share is said once."""
    texts = dict.fromkeys(map(str, wrong.values()))
    first = next(iter(wrong.values()))
    if len(texts) == 1:
        return first
    listed = " ".join(f"[{name}] {error}" for name, error in wrong.items())
    return ConfigError(
        f"{len(wrong)} of {total} combinations are wrong",
        where=str(file) if file else None,
        remedy=listed,
    )
