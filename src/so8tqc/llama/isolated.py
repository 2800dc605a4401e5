"""A GGUF model in a process of its own: a file on which libllama aborts does not take us along.

The worker (``llama.model_worker``) answers one line of JSON with another, on its standard input and
output. Logits come back through memory that both processes map.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from so8tqc import errors
from so8tqc.errors import ModelError, So8tqcError, ToolError
from so8tqc.llama.child import QUIET_ABORT, ending, reason, remedy
from so8tqc.llama.kv_types import DEFAULT_KV_TYPE

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  a file made there is random and ours alone
_ONE_BLAS_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
"""numpy's threads, which the worker gives nothing to do, take as long to start as Python does."""

_SAID_BYTES = 1 << 16
_GRACE_SECONDS = 5.0


class _Worker:
    """The process and the conversation with it.

    Args:
        path: the GGUF file, to name in errors.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "so8tqc.llama.model_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            encoding="utf-8",
            env={**os.environ, **QUIET_ABORT, **_ONE_BLAS_THREAD},
            start_new_session=True,  # Ctrl-C is this process's to handle
        )

    def ask(self, do: str, **arguments: object) -> Any:
        """Send one request and wait for its answer."""
        answer = ""
        with suppress(BrokenPipeError):
            _pipe(self._process.stdin).write(json.dumps({"do": do, **arguments}) + "\n")
            _pipe(self._process.stdin).flush()
            answer = _pipe(self._process.stdout).readline()
        if not answer:
            raise self._death(do)
        message = json.loads(answer)
        if "error" in message:
            raise _rebuilt(**message["error"])
        return message["answer"]

    def _death(self, do: str) -> So8tqcError:
        status = self._process.wait()
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - _SAID_BYTES))
        said = self._said.read().decode("utf-8", "replace").splitlines()
        lines = [line for line in said if line.strip()]
        why = f": {reason(lines)}" if lines else ""
        mended, where = remedy(status), str(self._path)
        if do in ("open", "tokenize") and mended is None:
            return ModelError(f"libllama dies of this file ({ending(status)}){why}", where=where)
        return ToolError(f"libllama died ({ending(status)}){why}", where=where, remedy=mended)

    def close(self) -> None:
        """End the worker. Safe to call twice."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._said.close()


class IsolatedModel:
    """What ``llama.libllama.LlamaModel`` is, at a distance.

    Args:
        path: the GGUF file.
        threads: CPU threads, None for libllama's default.
        context: initial context length, tokens.
        kv_type: see ``LlamaModel``.

    Attributes:
        vocab_size: V.
        trained_context: longest context the model was trained for, tokens.
        file_type: e.g. ``Q5_K_M``; "" if the file does not say.

    Raises:
        ModelError: not a loadable GGUF, or one that kills libllama.
        MissingToolError: no libllama.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        context: int = 512,
        kv_type: str = DEFAULT_KV_TYPE,
    ) -> None:
        self.path = path
        self._logits: npt.NDArray[np.float32] = np.empty((0, 0), dtype=np.float32)
        self._worker = _Worker(path)
        try:
            facts = self._worker.ask(
                "open", path=str(path), threads=threads, context=context, kv_type=kv_type
            )
            self.vocab_size = int(facts["vocab_size"])
            self.trained_context = int(facts["trained_context"])
            self.file_type = str(facts["file_type"])
        except BaseException:
            self.close()
            raise

    def ends(self, token: int) -> bool:
        """Whether a token ends a generation."""
        return bool(self._worker.ask("ends", token=token))

    def pieces(self) -> list[str | None]:
        """See ``LlamaModel.pieces``."""
        return list(self._worker.ask("pieces"))

    def begin(self, length: int) -> None:
        """Start a new text: forget the tokens so far and make room for ``length``.

        Raises:
            DataError: longer than the model's trained context.
        """
        self._worker.ask("begin", length=length)

    def decode(
        self, tokens: npt.NDArray[np.int64], position: int, first: int = 0
    ) -> npt.NDArray[np.float32]:
        """Feed tokens that follow ``position`` earlier ones; logits of them from ``first`` on.

        Returns:
            [n − first, V] float32, valid until the next call.

        Raises:
            DataError: a token is not in the vocabulary.
            ToolError: libllama reports an error, or dies.
        """
        wanted = int(tokens.size) - first
        if wanted > self._logits.shape[0]:
            self._logits = self._share(wanted)
        self._worker.ask("decode", tokens=tokens.tolist(), position=position, first=first)
        return self._logits[:wanted]

    def see(
        self,
        rows: npt.NDArray[np.float32],
        positions: npt.NDArray[np.int64],
        first: int = 0,
        *,
        both_ways: bool = False,
    ) -> npt.NDArray[np.float32]:
        """Feed embeddings in the place of tokens: see ``LlamaModel.see``.

        Returns:
            [n − first, V] float32, valid until the next call.

        Raises:
            ModelError: the model takes embeddings of another width.
            ToolError: libllama reports an error, or dies.
        """
        wanted = int(rows.shape[0]) - first
        if wanted > self._logits.shape[0]:
            self._logits = self._share(wanted)
        with tempfile.NamedTemporaryFile(prefix="so8tqc-rows-", suffix=".npy") as file:
            np.save(file, rows, allow_pickle=False)
            file.flush()
            self._worker.ask(
                "see",
                file=file.name,
                positions=positions.tolist(),
                first=first,
                both_ways=both_ways,
            )
        return self._logits[:wanted]

    def time(self, tokens: npt.NDArray[np.int64], position: int) -> float:
        """Feed tokens as :meth:`decode` does; seconds that libllama takes, without the transport.

        Raises:
            DataError: a token is not in the vocabulary.
            ToolError: libllama reports an error, or dies.
        """
        return float(self._worker.ask("time", tokens=tokens.tolist(), position=position))

    def close(self) -> None:
        """End the worker. Safe to call twice."""
        self._worker.close()

    def _share(self, rows: int) -> npt.NDArray[np.float32]:
        """Map memory for ``rows`` rows of logits in both processes; no name of it remains."""
        file = _shared_file(rows * self.vocab_size * 4)
        try:
            logits: npt.NDArray[np.float32] = np.memmap(
                file, np.float32, mode="r+", shape=(rows, self.vocab_size)
            )
            self._worker.ask("share", file=str(file), rows=rows)
        finally:
            with suppress(OSError):  # where open files cannot be unlinked, it stays until later
                file.unlink()
        return logits


def first_logits(path: Path, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Logits of every position of a text: [T] ids → [T, V] float32.

    Raises:
        ModelError, MissingToolError, ToolError: as :class:`IsolatedModel`.
    """
    model = IsolatedModel(path, context=tokens.size)
    try:
        model.begin(tokens.size)
        return model.decode(tokens, 0).copy()
    finally:
        model.close()


def tokenize(path: Path, text: str) -> tuple[npt.NDArray[np.int64], int | None]:
    """Token ids of a text by a GGUF file's own vocabulary, and its BOS: ``libllama.tokenize``.

    Raises:
        ModelError: not a loadable GGUF, one without a vocabulary, or one that kills libllama.
        MissingToolError: no libllama.
    """
    worker = _Worker(path)
    try:
        ids, bos = worker.ask("tokenize", path=str(path), text=text)
    finally:
        worker.close()
    return np.array(ids, dtype=np.int64), bos


def _pipe(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise ToolError("the libllama worker has no pipes")
    return stream


def _shared_file(size: int) -> Path:
    """A new file of ``size`` bytes, in memory where there is room, else in the temporary folder."""
    folders = [_SHARED_MEMORY, None] if os.access(_SHARED_MEMORY, os.W_OK) else [None]
    for folder in folders:
        handle, name = tempfile.mkstemp(prefix="so8tqc-logits-", dir=folder)
        try:
            # reserved, not only claimed: writing to a page that does not fit would kill
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, size)
            else:
                os.truncate(handle, size)
        except OSError as error:
            Path(name).unlink()
            if folder is None:
                raise ToolError(
                    f"no room for {size / 1e6:.0f} MB of logits: {error.strerror}", where=name
                ) from None
            continue
        finally:
            os.close(handle)
        return Path(name)
    raise AssertionError("the last folder either has room or raises")


def _rebuilt(kind: str, what: str, where: str | None, remedy: str | None) -> So8tqcError:
    """The worker's error, raised again here."""
    made: So8tqcError = getattr(errors, kind)(what, where=where, remedy=remedy)
    return made
