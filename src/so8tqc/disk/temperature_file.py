"""``temperature_config.json``: read as a stranger's, and held against the model it is used for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from so8tqc.disk.digests import sha256_file
from so8tqc.disk.foreign import read_whole
from so8tqc.errors import DataError

TEMPERATURE_FILE = "temperature_config.json"


def read_temperature(path: Path) -> dict[str, Any]:
    """What ``so8tqc calibrate`` wrote.

    Raises:
        DataError: there is no file, or none that is a JSON object.
    """
    if not path.exists():
        raise DataError("there is no temperature configuration", where=str(path))
    content = read_whole(path, DataError)
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"no readable temperature configuration: {error}", where=str(path)
        ) from None
    if not isinstance(value, dict):
        raise DataError("not a temperature configuration: no JSON object", where=str(path))
    return value


def require_fitted_on(temperature: Mapping[str, Any], gguf: Path, where: str) -> None:
    """See that a temperature is still to be applied to a file: to the one it was fitted on, or to
    the copy that only declares it.

    Raises:
        DataError: it was fitted on another file, does not say on which, or is in the file already.
    """
    model = temperature.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("sha256"), str):
        raise DataError("does not say which file it was fitted on", where=where, remedy=_FIT)
    found = sha256_file(gguf)
    if found == model["sha256"]:
        return
    if found == temperature.get("applied_sha256"):
        applied = temperature.get("applied")
        if isinstance(applied, dict) and applied.get("how") == "metadata":
            return
        raise DataError(
            f"{gguf.name} has this temperature in its weights already: applied once more it would "
            "count twice",
            where=where,
            remedy="Serve that file at temperature 1.",
        )
    raise DataError(
        f"the temperature was fitted on {model.get('file', 'another file')} "
        f"(sha256 {model['sha256'][:12]}…), which {gguf.name} (sha256 {found[:12]}…) is not: "
        "another model, or another quantization, needs another",
        where=where,
        remedy=_FIT,
    )


_FIT = "Fit one on the file that is served: so8tqc calibrate FILE.gguf --tokenizer MODEL --out DIR"
