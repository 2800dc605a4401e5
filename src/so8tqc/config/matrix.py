"""``matrix:`` of a run file: one combination of values for each run, as in GitHub Actions.

    matrix:
      base: [model-a, model-b]
      quantize.types: [[Q5_K_M], [Q8_0]]
      exclude:
        - {base: model-b, quantize.types: [Q8_0]}
      include:
        - {base: model-b, qc.seed: 1}

Every key but ``exclude`` and ``include`` is an option of a run, dotted as for ``--set``, with a
list of values. ``exclude`` and ``include`` mean what they mean there.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import product
from pathlib import PurePosixPath
from typing import Any

from so8tqc.config.stages import RunConfig, option_paths
from so8tqc.errors import ConfigError

MATRIX, INCLUDE, EXCLUDE = "matrix", "include", "exclude"
LIMIT = 256
"""Combinations of one matrix, as in GitHub Actions."""

_LONGEST_NAME = 100
_ENDINGS = {".safetensors", ".pt", ".pth", ".bin", ".gguf", ".yaml", ".yml", ".json", ".jsonl"}
_DERIVED = ("out",)
"""Options that a matrix may not give: each combination has a directory of its own."""

Values = dict[str, Any]


def axis_options() -> list[str]:
    """The options that a matrix may vary, dotted, in the order of the models."""
    paths = list(option_paths(RunConfig))
    sections = {path[:-1] for path in paths}
    return [".".join(path) for path in paths if path not in sections and path[0] not in _DERIVED]


def expand(matrix: Mapping[str, Any]) -> list[Values]:
    """The combinations of a matrix, each a mapping of dotted keys to values.

    ``exclude`` takes away what agrees with all of an entry's values. An entry of ``include`` is
    added to each combination of the axes that it contradicts in nothing; where there is none,
    it is a combination of its own. Values that an earlier entry added may be replaced, those of
    the axes are not.

    Args:
        matrix: checked by :func:`check_matrix`.
    """
    axes = {key: values for key, values in matrix.items() if key not in (INCLUDE, EXCLUDE)}
    whole = [dict(zip(axes, chosen, strict=True)) for chosen in product(*axes.values()) if chosen]
    kept = [c for c in whole if not any(_agrees(entry, c) for entry in matrix.get(EXCLUDE, ()))]
    grown = [dict(combination) for combination in kept]
    alone: list[Values] = []
    for entry in matrix.get(INCLUDE, ()):
        fits = [
            into
            for into, axis_values in zip(grown, kept, strict=True)
            if all(entry[key] == value for key, value in axis_values.items() if key in entry)
        ]
        for combination in fits:
            combination.update(entry)
        if not fits:
            alone.append(dict(entry))
    return grown + alone


def _agrees(entry: Mapping[str, Any], combination: Mapping[str, Any]) -> bool:
    return all(key in combination and combination[key] == value for key, value in entry.items())


def check_matrix(matrix: object) -> Mapping[str, Any]:
    """The matrix of a run file, checked for its shape.

    Raises:
        ConfigError: no mapping, an unknown option, no list of values, an entry of ``exclude`` that
            takes nothing away, a combination given twice, none at all, or more than 256; the
            message begins with the key.
    """
    if not isinstance(matrix, dict):
        raise ConfigError(f"key {MATRIX}: expected options with lists of values")
    known = axis_options()
    axes = {key: values for key, values in matrix.items() if key not in (INCLUDE, EXCLUDE)}
    for key, values in axes.items():
        _require_option(key, f"{MATRIX}.{key}", known)
        if not isinstance(values, list) or not values:
            raise ConfigError(
                f"key {MATRIX}.{key}: expected a list of values, one for each combination",
                remedy="An option that is a list itself needs two brackets, such as [[Q5_K_M]]."
                if _is_list(key)
                else None,
            )
    for part in (INCLUDE, EXCLUDE):
        _check_entries(matrix.get(part, []), part, axes if part == EXCLUDE else known, known)
    _require_effect(axes, matrix.get(EXCLUDE, []))
    _require_distinct(expand(matrix))
    return matrix


def _require_option(key: object, where: str, known: Sequence[str]) -> None:
    if key in known:
        return
    if key in _DERIVED:
        raise ConfigError(f"key {where}: each combination has its own directory in out")
    close = difflib.get_close_matches(str(key), known, n=1)
    inside = [option for option in known if option.startswith(f"{key}.")]
    remedy = f"Did you mean {close[0]}?" if close else None
    if inside:
        remedy = f"Name one of its options, such as {inside[0]}."
    raise ConfigError(f"unknown key {where}", remedy=remedy)


def _is_list(key: str) -> bool:
    model: Any = RunConfig
    *sections, name = key.split(".")
    for section in sections:
        model = model.model_fields[section].annotation
    return str(model.model_fields[name].annotation).startswith("tuple")


def _check_entries(entries: object, part: str, keys: Collection[str], known: Sequence[str]) -> None:
    if not isinstance(entries, list):
        raise ConfigError(f"key {MATRIX}.{part}: expected a list of mappings")
    for i, entry in enumerate(entries):
        where = f"{MATRIX}.{part}.{i}"
        if not isinstance(entry, dict) or not entry:
            raise ConfigError(f"key {where}: expected options with their values")
        for key in entry:
            _require_option(key, f"{where}.{key}", known)
            if key not in keys:
                raise ConfigError(f"key {where}.{key}: {key} is no axis of this matrix")


def _require_effect(axes: Mapping[str, list[Any]], exclude: Sequence[Values]) -> None:
    for i, entry in enumerate(exclude):
        if any(value not in axes[key] for key, value in entry.items()):
            raise ConfigError(
                f"key {MATRIX}.{EXCLUDE}.{i}: takes no combination away",
                remedy=f"Mend or delete it; for one run: --set '{MATRIX}.{EXCLUDE}=[]'.",
            )


def _require_distinct(combinations: Sequence[Values]) -> None:
    if not combinations:
        raise ConfigError(f"key {MATRIX}: there is no combination")
    if len(combinations) > LIMIT:
        raise ConfigError(f"key {MATRIX}: {len(combinations)} combinations, {LIMIT} at most")
    texts = [_text(combination) for combination in combinations]
    for i, text in enumerate(texts):
        if text in texts[:i]:
            raise ConfigError(f"key {MATRIX}: a combination is given twice: {text}")


def names_of(combinations: Sequence[Values]) -> list[str]:
    """A directory name for each combination: its values, short, joined by commas.

    Of a path the last part is taken; if two values of a key look alike then, all of it. A
    number or a switch has the key's name before it: ``seed=1``.
    """
    labels: dict[str, dict[str, str]] = {}
    for key in dict.fromkeys(key for combination in combinations for key in combination):
        values = {_text(c[key]): c[key] for c in combinations if key in c}
        labels[key] = _labels(key, values)
    names = [
        ",".join(labels[key][_text(value)] for key, value in combination.items())
        for combination in combinations
    ]
    folded = [name.casefold() for name in names]
    return [
        _cut(name, combination)
        if len(name) > _LONGEST_NAME or folded.count(name.casefold()) > 1
        else name
        for name, combination in zip(names, combinations, strict=True)
    ]


def _labels(key: str, values: Mapping[str, Any]) -> dict[str, str]:
    short = {text: _label(key, value, whole=False) for text, value in values.items()}
    if len({label.casefold() for label in short.values()}) == len(short):
        return short
    return {text: _label(key, value, whole=True) for text, value in values.items()}


def _label(key: str, value: object, *, whole: bool) -> str:
    if isinstance(value, list):
        text = "+".join(_label(key, item, whole=whole) for item in value)
    elif isinstance(value, str):
        text = value.removeprefix("builtin:") if whole else _last_part(value)
    else:
        text = f"{key.rpartition('.')[2]}={json.dumps(value)}"
    return re.sub(r"[^\w.+=-]+", "-", text).strip("-.") or "none"


def _last_part(text: str) -> str:
    path = PurePosixPath(text.removeprefix("builtin:").replace("\\", "/"))
    return path.stem if path.suffix in _ENDINGS else path.name


def _cut(name: str, combination: Values) -> str:
    digest = hashlib.sha256(_text(combination).encode()).hexdigest()[:8]
    return f"{name[: _LONGEST_NAME - 9]}-{digest}"


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
