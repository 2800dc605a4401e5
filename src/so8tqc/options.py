"""What every options model is: closed, immutable, with paths that stay paths."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, model_validator

from so8tqc.paths import anchored


class Options(BaseModel):
    """Base: closed, immutable, checked on assignment of defaults too."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _explicit_paths(cls, values: object) -> object:
        """``./x/y`` stays a path: without the dot it may be the name of a model on a hub."""
        if not isinstance(values, dict):
            return values
        return {
            name: anchored(value)
            if isinstance(value, str)
            else [anchored(v) if isinstance(v, str) else v for v in value]
            if isinstance(value, list)
            else value
            for name, value in values.items()
        }
