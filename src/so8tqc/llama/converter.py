"""Running llama.cpp's converter as a subprocess: its progress, and its output where it fails."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from so8tqc.errors import ToolError
from so8tqc.llama.child import ending, follow, reason
from so8tqc.llama.generation_keys import mended
from so8tqc.llama.guarded_script import GENERATION, KEYS, TRACE, TRACE_ALONE
from so8tqc.llama.vendor import Converter
from so8tqc.progress import SILENT, Progress

_PERCENT = re.compile(r"(\d+)%\|")
_TENSOR = re.compile(r"INFO:hf-to-gguf:\s*(\S+?),\s")


def convert(
    converter: Converter,
    model: Path,
    out: Path,
    type_: str,
    log: Path,
    progress: Progress = SILENT,
    *,
    trace: Path | None = None,
    arguments: Sequence[str] = (),
    keys: Mapping[str, Any] | None = None,
) -> None:
    """Convert a model directory to one GGUF file.

    Args:
        converter: which script.
        model: transformers model directory; Python code in it is never run.
        out: file to write (not atomic: give a temporary path).
        type_: ``f32``, ``f16``, ``bf16`` or ``q8_0``.
        log: the converter's whole output goes here.
        progress: told about tensors read and per cent written.
        trace: file for the history of every tensor (``llama.conversion_trace``).
        arguments: further ones for the script.
        keys: what the model's configuration shall say besides (``llama.config_keys``).

    Raises:
        ToolError: the converter failed; the message holds its last meaningful line.
    """
    # the converter takes the name for a template, in which {ftype} stands for the type
    literal = str(out).replace("{", "{{").replace("}", "}}")
    command = [
        sys.executable,
        "-P",
        "-m",
        "so8tqc.llama.guarded_script",
        str(converter.script),
        str(model),
        "--outtype",
        type_,
        "--outfile",
        literal,
        *arguments,
    ]
    with (
        log.open("w", encoding="utf-8") as sink,
        progress.task("converting to GGUF", total=100, unit="%") as task,
    ):
        done = 0

        def follow_line(line: str) -> None:
            nonlocal done
            sink.write(line + "\n")
            if percent := _PERCENT.search(line):
                task.advance(int(percent[1]) - done, item="writing")
                done = int(percent[1])
            elif tensor := _TENSOR.search(line):
                task.advance(0, item=tensor[1])

        status, last = follow(command, follow_line, _environment(converter, model, trace, keys))
    if status != 0 or not (out.is_file() and out.stat().st_size):
        raise ToolError(
            f"the converter failed ({ending(status)}): {reason(last)}",
            where=str(model),
            remedy=f"Its whole output is in {log}.",
        )


_PLAIN = (
    (
        re.compile(r"KeyError: ['\"](?P<it>[\w.]+)['\"]$"),
        "it asks the configuration for `{it}`, which the model does not say",
    ),
    (
        re.compile(r"KeyError: \"could not find any of: \[(?P<it>.+)\]\""),
        "it asks the configuration for {it}, which the model does not say",
    ),
    (
        re.compile(r"KeyError: '(?P<it>[<\[].+[>\]])'$"),
        "it looks for {it} among the tokenizer's special tokens, and it is not there",
    ),
    (
        re.compile(r"Can not map tensor '(?P<it>.+)'"),
        "it has no name in GGUF for the tensor {it}, so that it knows this type with other tensors",
    ),
    (re.compile(r"KeyError: '(?P<it>.+ .+)'$"), "it stops with: {it}"),
    (
        re.compile(r"BPE pre-tokenizer was not recognized"),
        "it does not know this tokenizer: its list has no pre-tokenizer that splits text alike",
    ),
    (re.compile(r"Model (?P<it>\S+) is not supported"), "it does not know models of class {it}"),
    (
        re.compile(r"AssertionError: `assert (?P<it>.+)` does not hold"),
        "its own check `{it}` does not hold for this model",
    ),
    (re.compile(r"(?:AssertionError|NotImplementedError): (?P<it>.+)"), "it stops with: {it}"),
    (
        re.compile(r"TypeError: '(?:int|float)' object is not (?:iterable|subscriptable)"),
        "it reads a list, with a value for each layer, where this configuration has one number",
    ),
    (
        re.compile(r"(?:File not found:|Missing) \S*?(?P<it>[\w.-]+)$"),
        "it needs {it} in the model directory for this type",
    ),
)
"""The converter's last words → what they mean; what is not here is handed on as it is."""


def in_plain_words(error: ToolError) -> ToolError:
    """A failure of the converter as a sentence that says what it could not do."""
    for pattern, meaning in _PLAIN:
        if match := pattern.search(error.what):
            said = meaning.format(**match.groupdict())
            what = f"the converter cannot convert this model: {said}"
            return ToolError(what, where=error.where, remedy=error.remedy)
    return error


def trace_conversion(
    converter: Converter,
    model: Path,
    trace: Path,
    keys: Mapping[str, Any] | None = None,
    arguments: Sequence[str] = (),
) -> None:
    """Have the converter say what it would do to every tensor; it writes no GGUF.

    Args:
        converter, model, trace, keys, arguments: as of :func:`convert`.

    Raises:
        ToolError: it failed.
    """
    command = [
        sys.executable,
        "-P",
        "-m",
        "so8tqc.llama.guarded_script",
        str(converter.script),
        str(model),
        "--outtype",
        "f16",
        "--outfile",
        str(trace.with_suffix(".gguf")),
        *arguments,
    ]
    environment = _environment(converter, model, trace, keys) | {TRACE_ALONE: "1"}
    status, last = follow(command, lambda _line: None, environment)
    if status != 0:
        raise ToolError(
            f"the converter failed ({ending(status)}): {reason(last)}", where=str(model)
        )


def _environment(
    converter: Converter, model: Path, trace: Path | None, keys: Mapping[str, Any] | None = None
) -> dict[str, str]:
    generation = mended(model)
    paths = [str(converter.python_path)] if converter.python_path else []
    paths += [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONUNBUFFERED": "1",
        **({KEYS: json.dumps(keys)} if keys else {}),
        **({} if generation is None else {GENERATION: json.dumps(generation.values)}),
        **({} if trace is None else {TRACE: str(trace)}),
    }
