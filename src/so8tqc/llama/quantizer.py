"""Quantization by libllama, in a process of its own."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from so8tqc.errors import ConfigError, ToolError
from so8tqc.llama.child import ending, follow, reason
from so8tqc.llama.libllama import library

_PREFIXES = ("MOSTLY_", "ALL_")
_TENSOR = re.compile(r"^\[\s*\d+/\s*\d+\]\s+(\S+)")


def quantization_types() -> dict[str, int]:
    """Name (``Q5_K_M``) → libllama's file type: all it offers that gguf-py can read back."""
    from gguf import LlamaFileType

    lib = library()
    types: dict[str, int] = {}
    for name in dir(lib):
        known = name.removeprefix("LLAMA_FTYPE_")
        for prefix in _PREFIXES:
            if known.startswith(prefix) and known in LlamaFileType.__members__:
                types[known.removeprefix(prefix)] = int(getattr(lib, name))
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
    source: Path,
    destination: Path,
    file_type: int,
    *,
    threads: int | None = None,
    imatrix: Path | None = None,
    on_tensor: Callable[[str], None],
) -> None:
    """Run ``llama_model_quantize`` in a child process, which dies with an interruption.

    Args:
        source: an unquantized GGUF, validated by the caller.
        destination: file to write (not atomic: give a temporary path).
        file_type: see :func:`resolve_type`.
        threads: CPU threads, None for all.
        imatrix: importance matrix, validated by the caller.
        on_tensor: told the name of every tensor that is done.

    Raises:
        ToolError: libllama reports an error, or dies.
    """
    command = [
        sys.executable, "-P", "-m", "so8tqc.llama.quantize_worker", str(source), str(destination),
        str(file_type), str(threads or 0), *([str(imatrix)] if imatrix else []),
    ]  # fmt: skip

    def follow_line(line: str) -> None:
        if tensor := _TENSOR.match(line):
            on_tensor(tensor[1])

    # ggml would start a debugger on itself before it aborts
    status, last = follow(command, follow_line, {"GGML_NO_BACKTRACE": "1"})
    if status != 0:
        said = reason(last)
        needs_matrix = imatrix is None and re.search(r"imatrix|importance matrix", said)
        raise ToolError(
            f"libllama cannot quantize ({ending(status)}): {said}",
            where=str(source),
            remedy="Give an importance matrix (imatrix)." if needs_matrix else None,
        )
