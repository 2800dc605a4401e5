"""JSON Schema of the config files, for editors: made from the models, never written by hand."""

from __future__ import annotations

import json
from typing import Any

from so8tqc.config import config_model
from so8tqc.config_extends import EXTENDS

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
        schema["anyOf"] = [{"required": required}, {"required": [EXTENDS]}]
    schema["properties"][EXTENDS] = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "Config files that this one stands on, relative to it; later ones hide "
        "earlier ones.",
    }
    title = f"so8tqc {command} --config" if command else "so8tqc run"
    return {"$schema": DIALECT, **schema, "title": title}


def schema_text(command: str | None = None) -> str:
    """The schema as a file: indented, non-ASCII as it is, a newline at its end."""
    return json.dumps(config_schema(command), indent=2, ensure_ascii=False) + "\n"
