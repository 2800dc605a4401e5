"""Running a file that libllama has not seen before, in a process of its own."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from so8tqc.errors import ToolError
from so8tqc.llama.child import ending, follow, reason
from so8tqc.llama.libllama import bindings


def first_logits(gguf: Path, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Logits of every position of a text, computed by libllama in a child process.

    Args:
        gguf: the file.
        tokens: [T] ids.

    Returns:
        [T, V] float32.

    Raises:
        MissingToolError: no libllama.
        ToolError: libllama does not load or run the file, or dies of it.
    """
    bindings()
    with tempfile.TemporaryDirectory(prefix="so8tqc-") as scratch:
        ids, logits = Path(scratch) / "tokens.npy", Path(scratch) / "logits.npy"
        np.save(ids, tokens)
        command = [
            sys.executable, "-P", "-m", "so8tqc.llama.logits_worker",
            str(gguf), str(ids), str(logits),
        ]  # fmt: skip
        status, last = follow(command, lambda _line: None, {"GGML_NO_BACKTRACE": "1"})
        if status != 0:
            raise ToolError(f"libllama cannot run it ({ending(status)}): {reason(last)}")
        array: npt.NDArray[np.float32] = np.load(logits)
    return array
