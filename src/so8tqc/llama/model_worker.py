"""The process in which libllama runs a model: it may abort without us.

``python -P -m so8tqc.llama.model_worker``, spoken to by ``llama.isolated``: requests and answers
are lines of JSON on standard input and output. It ends when its input does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from so8tqc.errors import So8tqcError
from so8tqc.llama.libllama import LlamaModel, tokenize
from so8tqc.llama.light import light_bindings


class Worker:
    """One model, and the memory its logits are copied to."""

    def __init__(self) -> None:
        self._model: LlamaModel | None = None
        self._shared: np.memmap[tuple[int, int], np.dtype[np.float32]] | None = None

    def open(self, path: str, threads: int | None, context: int, kv_type: str) -> dict[str, object]:
        """Load the model; its facts."""
        model = LlamaModel(Path(path), threads=threads, context=context, kv_type=kv_type)
        self._model = model
        return {
            "vocab_size": model.vocab_size,
            "trained_context": model.trained_context,
            "file_type": model.file_type,
        }

    def share(self, file: str, rows: int) -> None:
        """Map the file that logits go to, [rows, V] float32."""
        self._shared = np.memmap(file, np.float32, mode="r+", shape=(rows, self.model.vocab_size))

    def begin(self, length: int) -> None:
        """See ``LlamaModel.begin``."""
        self.model.begin(length)

    def decode(self, tokens: list[int], position: int, first: int) -> None:
        """See ``LlamaModel.decode``; the rows lie in the shared memory afterwards."""
        logits = self.model.decode(np.array(tokens, dtype=np.int64), position, first)
        if self._shared is None:
            raise RuntimeError("nothing is shared yet")
        self._shared[: logits.shape[0]] = logits

    def see(self, file: str, positions: list[Any], first: int, both_ways: bool) -> None:
        """See ``LlamaModel.see``; the rows come in a file, the logits lie in the shared memory."""
        rows = np.load(file, allow_pickle=False)
        places = np.array(positions, dtype=np.int64)
        logits = self.model.see(rows, places, first, both_ways=both_ways)
        if self._shared is None:
            raise RuntimeError("nothing is shared yet")
        self._shared[: logits.shape[0]] = logits

    def time(self, tokens: list[int], position: int) -> float:
        """Seconds that ``LlamaModel.decode`` takes to the logits of the last token."""
        fed = np.array(tokens, dtype=np.int64)
        started = time.perf_counter()
        self.model.decode(fed, position, fed.size - 1)
        return time.perf_counter() - started

    def tokenize(self, path: str, text: str) -> tuple[list[int], int | None]:
        """See ``libllama.tokenize``; no model needs to be open."""
        ids, bos = tokenize(Path(path), text)
        return ids.tolist(), bos

    def ends(self, token: int) -> bool:
        """See ``LlamaModel.ends``."""
        return self.model.ends(token)

    def pieces(self) -> list[str | None]:
        """See ``LlamaModel.pieces``."""
        return self.model.pieces()

    @property
    def model(self) -> LlamaModel:
        """The loaded model."""
        if self._model is None:
            raise RuntimeError("no model is open yet")
        return self._model

    def answer(self, request: dict[str, Any]) -> dict[str, object]:
        """Do what a request says; what went wrong is an answer, too."""
        actions: dict[str, Callable[..., object]] = {
            "open": self.open,
            "share": self.share,
            "begin": self.begin,
            "decode": self.decode,
            "see": self.see,
            "time": self.time,
            "ends": self.ends,
            "tokenize": self.tokenize,
            "pieces": self.pieces,
        }
        try:
            return {"answer": actions[request.pop("do")](**request)}
        except So8tqcError as error:
            return {
                "error": {
                    "kind": type(error).__name__,
                    "what": error.what,
                    "where": error.where,
                    "remedy": error.remedy,
                }
            }


def main() -> None:
    """Answer requests until the standard input ends."""
    with suppress(ImportError, OSError):  # what is missing is said where it is needed
        light_bindings()
    worker = Worker()
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), flush=True)
    os._exit(0)  # to take a model's memory apart piece by piece would take longer than to drop it


if __name__ == "__main__":
    main()
