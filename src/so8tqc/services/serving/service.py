"""Serve-config: what a runtime is told by to serve a GGUF as it was judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from so8tqc.config import Runtime, ServeConfig
from so8tqc.disk.atomic import write_text
from so8tqc.services.serving.facts import Serving, facts_of
from so8tqc.services.serving.runtimes import (
    Written,
    llama_cpp_python,
    llama_server,
    lm_studio,
    modelfile,
    transformers_config,
)

_WRITERS: Mapping[Runtime, Callable[[Serving], Written]] = {
    "ollama": modelfile,
    "llama-server": llama_server,
    "llama-cpp-python": llama_cpp_python,
    "transformers": transformers_config,
    "lm-studio": lm_studio,
}


class Served(NamedTuple):
    """A runtime's file and what it says.

    ``origin``: where the temperature came from; ``notices``: what could not be found or written.
    """

    text: str
    temperature: float | None
    origin: str
    stops: tuple[str, ...]
    notices: tuple[str, ...]


def serve_config(config: ServeConfig) -> Served:
    """Write a runtime's own file: the fitted temperature, the chat template, where answers end.

    Raises:
        ModelError: no readable GGUF, or what a runtime's file cannot hold.
        DataError: a temperature of another model.
        InputError: a model directory that is none.
        ToolError: nothing can be written.
    """
    serving = facts_of(config.gguf, config.model, config.temperature)
    written = _WRITERS[config.runtime](serving)
    if config.out is not None:
        write_text(config.out, written.text)
    return Served(
        written.text,
        serving.temperature.value,
        serving.temperature.origin,
        tuple(token.text for token in serving.stops),
        (*serving.notices, *written.notices),
    )
