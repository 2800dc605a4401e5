"""Importance matrices from calibration text, run through the very file that is quantized."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from so8tqc.config import QUALITY_TEXTS
from so8tqc.disk.atomic import atomic_file
from so8tqc.errors import DataError, ModelError, ToolError
from so8tqc.gguf.file import GGUFFile
from so8tqc.llama.child import QUIET_ABORT, ending, follow, reason, remedy
from so8tqc.llama.imatrix import ImportanceMatrix, read_imatrix
from so8tqc.llama.imatrix_worker import TOO_SHORT
from so8tqc.progress import SILENT, Progress
from so8tqc.services.quantize.calibration import calibration_texts

CHUNK_TOKENS = 512
"""Tokens of a chunk, as ``llama-imatrix`` has it."""

_DONE = re.compile(r"^chunk (\d+)/(\d+)$")


def compute_imatrix(
    model: GGUFFile,
    data: Sequence[str],
    out: Path,
    *,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> ImportanceMatrix:
    """Run calibration text through a GGUF and sum the squared inputs of every layer's matrices.

    The numbers are those of ``llama-imatrix`` on the same text (float64 sums here, float32
    there); ``out`` has its format.

    Args:
        model: an unquantized GGUF with a tokenizer.
        data: files and built-in sets of texts, joined by empty lines.
        out: the importance matrix to write, complete or not at all.
        threads: CPU threads, None for libllama's default.
        progress: told about chunks.

    Raises:
        ModelError: the GGUF has no tokenizer, or a tensor's inputs are zero or not finite.
        DataError: there is no text, fewer tokens than a chunk, or one of ``builtin:validation``.
        ToolError: libllama reports an error, or dies.
    """
    if model.fields.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        raise ModelError(
            "the GGUF file has no tokenizer, so no text can be run",
            where=str(model.path),
            remedy="Give an importance matrix (--imatrix FILE).",
        )
    text = "\n\n".join(text.full for text in calibration_texts(data, (QUALITY_TEXTS,)))
    with atomic_file(out) as temporary, tempfile.TemporaryDirectory() as folder:
        calibration = Path(folder) / "calibration.txt"
        calibration.write_text(text, encoding="utf-8")
        _run(model.path, calibration, temporary, data, threads, progress)
        matrix = read_imatrix(temporary)
    return replace(matrix, path=out)


def _run(
    gguf: Path,
    text: Path,
    out: Path,
    data: Sequence[str],
    threads: int | None,
    progress: Progress,
) -> None:
    job = {
        "gguf": str(gguf),
        "text": str(text),
        "out": str(out),
        "threads": threads or 0,
        "chunk": CHUNK_TOKENS,
        "datasets": [Path(name).name for name in data],
    }
    command = [sys.executable, "-P", "-m", "so8tqc.llama.imatrix_worker", json.dumps(job)]
    with progress.task("weighing columns on calibration text", total=100, unit="%") as task:
        shown = 0.0

        def follow_line(line: str) -> None:
            nonlocal shown
            if done := _DONE.match(line):
                share = 100 * int(done[1]) / int(done[2])
                task.advance(share - shown, item=line)
                shown = share

        status, last = follow(command, follow_line, QUIET_ABORT)
    if status == TOO_SHORT:
        raise DataError(
            reason(last).removeprefix("error: "),
            where=", ".join(data),
            remedy="Give more calibration text (--imatrix-data).",
        )
    if status != 0:
        raise ToolError(
            f"libllama cannot weigh the columns ({ending(status)}): {reason(last)}",
            where=str(gguf),
            remedy=remedy(status),
        )
