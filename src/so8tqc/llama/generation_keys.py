"""Sampling defaults of a model directory, as the converter can write them.

gguf-py packs each value of ``generation_config.json`` as the type of its GGUF key and ends with a
bare ``struct.error`` where JSON has another: ``20.0``, which many tools write for 20, or ``"0.7"``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import JsonValue

from so8tqc.disk.foreign import read_whole
from so8tqc.errors import ModelError

FILE = "generation_config.json"

_WHOLE = ("top_k", "penalty_last_n", "mirostat")
_REAL = (
    "temperature",
    "top_p",
    "min_p",
    "xtc_probability",
    "xtc_threshold",
    "penalty_repeat",
    "repetition_penalty",
    "mirostat_tau",
    "mirostat_eta",
)
_TEXT = ("sequence",)
_LARGEST = {True: 2.0**31 - 1, False: 3.4028234663852886e38}
"""Of an int32 and of a float32, which are what GGUF's keys hold."""


class Mended(NamedTuple):
    """What the converter is to read in place of the file, and a sentence for each change."""

    values: Mapping[str, JsonValue]
    notices: tuple[str, ...]


def mended(model: Path) -> Mended | None:
    """The generation config with values that the converter can write; None if it has such already.

    A number of another type becomes the right one; what is none, or has no room in its key, is
    left out.

    Raises:
        ModelError: the file is there and cannot be read.
    """
    path = model / FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(read_whole(path, ModelError).decode("utf-8"))
    except (ValueError, RecursionError):
        # as the converter does with what is no JSON; other bytes would end it
        return Mended({}, (f"{FILE} is not JSON: the file has no sampling defaults from it.",))
    if not isinstance(found, dict):
        notice = f"{FILE} is no JSON object: the file has no sampling defaults from it."
        return Mended({}, (notice,))
    values: dict[str, JsonValue] = {}
    notices: list[str] = []
    for key, value in found.items():
        fit = None if value is None else _fitting(key, value)
        if fit is not None or value is None:
            values[key] = fit
        if fit is not value:
            words = "was not given it" if fit is None else f"was given {fit!r}"
            notices.append(f"{FILE} says {key} = {value!r}: the converter {words}.")
    return Mended(values, tuple(notices)) if notices else None


def _fitting(key: str, value: JsonValue) -> JsonValue:
    """The value itself, where its key's type can hold it; as that type; None if neither."""
    if key in _TEXT:
        return value if isinstance(value, str) else None
    if key not in (*_WHOLE, *_REAL):
        return value
    number, whole = _number(value), key in _WHOLE
    if number is None or abs(number) > _LARGEST[whole] or (whole and number != int(number)):
        return None
    if isinstance(value, int if whole else int | float):
        return value
    return int(number) if whole else number


def _number(value: JsonValue) -> float | None:
    """A finite number, also where it is written as text; None of anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
