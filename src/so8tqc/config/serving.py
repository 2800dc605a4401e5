"""Configuration of ``serve-config``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from so8tqc.options import Options

Runtime = Literal["ollama", "llama-server", "llama-cpp-python", "transformers", "lm-studio"]


class ServeConfig(Options):
    """Telling a runtime how to serve a GGUF."""

    gguf: Path
    runtime: Runtime
    model: Path | None = Field(
        None,
        description="Directory that the GGUF was exported from, for the stop tokens of its "
        "generation config; default what the records beside it say.",
    )
    temperature: Path | None = Field(
        None,
        description="temperature_config.json of calibrate; default what the GGUF declares, or a "
        "file nearby that was fitted on it.",
    )
    out: Path | None = Field(None, description="File to write; default standard output.")
