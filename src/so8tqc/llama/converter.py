"""Running llama.cpp's converter as a subprocess, with its progress and its last words."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import deque
from pathlib import Path

from so8tqc.errors import ToolError
from so8tqc.llama.vendor import Converter
from so8tqc.progress import SILENT, Progress

_PERCENT = re.compile(r"(\d+)%\|")
_TENSOR = re.compile(r"INFO:hf-to-gguf:\s*(\S+?),\s")
_KEPT_LINES = 40


def convert(
    converter: Converter, model: Path, out: Path, type_: str, log: Path, progress: Progress = SILENT
) -> None:
    """Convert a model directory to one GGUF file.

    Args:
        converter: which script.
        model: transformers model directory.
        out: file to write (not atomic: give a temporary path).
        type_: ``f32``, ``f16``, ``bf16`` or ``q8_0``.
        log: the converter's whole output goes here.
        progress: told about tensors read and per cent written.

    Raises:
        ToolError: the converter failed; the message holds its last meaningful line.
    """
    command = [
        sys.executable, str(converter.script), str(model),
        "--outtype", type_, "--outfile", str(out),
    ]  # fmt: skip
    log.parent.mkdir(parents=True, exist_ok=True)
    last: deque[str] = deque(maxlen=_KEPT_LINES)
    with (
        log.open("w", encoding="utf-8") as sink,
        progress.task("converting to GGUF", total=100, unit="%") as task,
        subprocess.Popen(
            command,
            env=_environment(converter),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            bufsize=1,
        ) as process,
    ):
        done = 0
        try:
            # universal newlines turn the progress bar's carriage returns into lines
            for line in process.stdout or ():
                sink.write(line)
                last.append(line.rstrip())
                if percent := _PERCENT.search(line):
                    task.advance(int(percent[1]) - done, item="writing")
                    done = int(percent[1])
                elif tensor := _TENSOR.search(line):
                    task.advance(0, item=tensor[1])
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0 or not out.is_file():
        raise ToolError(
            f"the converter failed (exit {process.returncode}): {_reason(last)}",
            where=str(model),
            remedy=f"Its whole output is in {log}.",
        )


def _environment(converter: Converter) -> dict[str, str]:
    paths = [str(converter.python_path)] if converter.python_path else []
    paths += [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONUNBUFFERED": "1",
    }


def _reason(lines: deque[str]) -> str:
    """The last line that says something: an exception's or an error's, else the last one."""
    said = [line for line in lines if line.strip()]
    errors = [line for line in said if re.match(r"^(\w+(\.\w+)*(Error|Exception)\b|ERROR)", line)]
    return (errors or said or ["no output"])[-1].strip()
