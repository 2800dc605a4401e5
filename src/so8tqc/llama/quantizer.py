"""Quantization by libllama."""

from __future__ import annotations

import ctypes
from pathlib import Path

from so8tqc.errors import ConfigError, MissingToolError, ToolError
from so8tqc.llama.libllama import last_words, library

_PREFIXES = ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_")


def quantization_types() -> dict[str, int]:
    """Name (``Q5_K_M``) → libllama's file type, everything it offers."""
    lib = library()
    types: dict[str, int] = {}
    for name in dir(lib):
        for prefix in _PREFIXES:
            if name.startswith(prefix):
                types[name.removeprefix(prefix)] = int(getattr(lib, name))
    return types


def resolve_type(name: str) -> tuple[str, int]:
    """Canonical name and file type, whatever the case.

    Raises:
        ConfigError: libllama has no such type.
    """
    types = quantization_types()
    canonical = name.upper()
    if canonical not in types:
        raise ConfigError(
            f"libllama knows no quantization type {name!r}", remedy=f"It knows {', '.join(types)}."
        )
    return canonical, types[canonical]


def quantize_file(
    source: Path, destination: Path, file_type: int, *, threads: int | None = None
) -> None:
    """Run ``llama_model_quantize``.

    Args:
        source: an unquantized GGUF, validated by the caller.
        destination: file to write (not atomic: give a temporary path).
        file_type: see :func:`resolve_type`.
        threads: CPU threads, None for all.

    Raises:
        ToolError: libllama reports an error.
    """
    lib = library()
    parameters = lib.llama_model_quantize_default_params()
    parameters.ftype = file_type
    parameters.nthread = threads or 0
    code = lib.llama_model_quantize(
        str(source).encode(), str(destination).encode(), ctypes.byref(parameters)
    )
    if code != 0:
        raise ToolError(f"libllama cannot quantize (code {code}): {last_words()}",
                        where=str(source))  # fmt: skip


def library_version() -> str:
    """Version of the binding that libllama came with."""
    try:
        import llama_cpp
    except ImportError:
        raise MissingToolError("libllama is not available") from None
    return str(llama_cpp.__version__)
