"""JSON Schema of the config files, for editors: made from the models, never written by hand."""

from __future__ import annotations

import json
from typing import Any

from so8tqc.config.extends import EXTENDS
from so8tqc.config.matrix import EXCLUDE, INCLUDE, MATRIX, axis_options
from so8tqc.config.stages import config_model

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def config_schema(command: str | None = None) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a run file, or of what a command's ``--config`` reads.

    A command's file requires nothing: its flags may give every path.

    Raises:
        ConfigError: no such command.
    """
    schema = config_model(command).model_json_schema()
    required = schema.pop("required", [])
    if command is None:  # what is required may stand in a file that this one extends
        schema["anyOf"] = [{"required": keys} for keys in (required, [EXTENDS], [MATRIX])]
        schema["properties"][MATRIX] = _matrix_schema(schema)
    schema["properties"][EXTENDS] = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "Config files that this one stands on, relative to it; later ones hide "
        "earlier ones.",
    }
    title = f"so8tqc {command} --config" if command else "so8tqc run"
    return {"$schema": DIALECT, **schema, "title": title}


def _matrix_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Lists of what the options are, by their dotted names, and lists of mappings of them."""
    options = {key: {"$ref": _pointer(key, schema)} for key in axis_options()}
    entries = {
        "type": "array",
        "items": {
            "type": "object",
            "properties": options,
            "additionalProperties": False,
            "minProperties": 1,
        },
    }
    axes: dict[str, Any] = {
        key: {"type": "array", "items": option, "minItems": 1} for key, option in options.items()
    }
    axes[EXCLUDE] = entries | {"description": "Combinations that are left out."}
    axes[INCLUDE] = entries | {
        "description": "Values added to the combinations that they do not contradict, or else a "
        "combination of their own."
    }
    return {
        "type": "object",
        "properties": axes,
        "additionalProperties": False,
        "description": "Options with lists of values: one run for each combination, in its own "
        "directory of out.",
    }


def _pointer(key: str, schema: dict[str, Any]) -> str:
    """JSON pointer to the schema of an option."""
    first, *rest = key.split(".")
    pointer = f"#/properties/{first}"
    for name in rest:
        inner = schema
        for part in pointer.removeprefix("#/").split("/"):
            inner = inner[part]
        pointer = f"{inner['$ref']}/properties/{name}"
    return pointer


def schema_text(command: str | None = None) -> str:
    """The schema as a file: indented, non-ASCII as it is, a newline at its end."""
    return json.dumps(config_schema(command), indent=2, ensure_ascii=False) + "\n"
