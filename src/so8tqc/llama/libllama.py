"""libllama through ``llama_cpp``'s low-level bindings: the one place that imports them."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from so8tqc.errors import DataError, MissingToolError, ModelError, ToolError
from so8tqc.gguf.file import open_gguf
from so8tqc.llama.child import reason
from so8tqc.llama.kv_types import DEFAULT_KV_TYPE
from so8tqc.llama.pin import INSTALL_COMMAND

_KEPT_LINES = 30
_COMPUTED_AT_ONCE = 512
"""Tokens of one forward pass inside libllama; more would only need more memory."""

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)

_log_lines: deque[str] = deque(maxlen=_KEPT_LINES)
_library: Any = None
_callback: Any = None  # ctypes callbacks must outlive their registration


def bindings() -> Any:
    """The binding module.

    Raises:
        MissingToolError: llama-cpp-python is not installed or does not load.
    """
    try:
        from llama_cpp import llama_cpp as lib
    except (ImportError, OSError, RuntimeError) as error:
        said = str(error).strip().splitlines()
        raise MissingToolError(
            f"libllama is not available: {said[0] if said else type(error).__name__}",
            remedy=f"Run: {INSTALL_COMMAND} (compiles for 6 to 9 minutes on two cores, once)",
        ) from None
    return lib


def library() -> Any:
    """The binding module, its log diverted from the terminal into memory.

    Raises:
        MissingToolError: llama-cpp-python is not installed or does not load.
    """
    global _library, _callback  # noqa: PLW0603  one library per process is what libllama is
    if _library is not None:
        return _library
    lib = bindings()

    @lib.llama_log_callback  # type: ignore[untyped-decorator]
    def keep(_level: int, text: bytes, _data: object) -> None:
        line = text.decode("utf-8", "replace").strip()
        if line and line != ".":
            _log_lines.append(line)

    _callback = keep
    lib.llama_log_set(keep, ctypes.c_void_p(0))
    lib.llama_backend_init()
    _library = lib
    return lib


def last_words() -> str:
    """What libllama said last about a failure, for error messages."""
    return reason(_log_lines)


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back while libllama talks: raised inside its log callback, they
    would be lost."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    seen: list[int] = []
    raising = [number for number in _INTERRUPTS if callable(signal.getsignal(number))]
    before = {n: signal.signal(n, lambda number, _frame: seen.append(number)) for n in raising}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for held in dict.fromkeys(seen):
        signal.raise_signal(held)


def tokenize(path: Path, text: str) -> tuple[npt.NDArray[np.int64], int | None]:
    """Token ids of a text by a GGUF file's own vocabulary, and its BOS.

    As llama.cpp's tools read a text file: BOS in front if the vocabulary adds one, and
    the names of special tokens in the text are plain text.

    Returns:
        [T] ids; the BOS id, None if the vocabulary does not add one.

    Raises:
        ModelError: not a loadable GGUF, or one without a vocabulary.
        MissingToolError: no libllama.
    """
    open_gguf(path)
    lib = library()
    parameters = lib.llama_model_default_params()
    parameters.vocab_only = True
    _log_lines.clear()
    with _interrupts_deferred():
        model = lib.llama_model_load_from_file(os.fsencode(path), parameters)
    if not model:
        raise ModelError(f"libllama cannot load it: {last_words()}", where=str(path))
    try:
        vocabulary = lib.llama_model_get_vocab(model)
        if lib.llama_vocab_type(vocabulary) == lib.LLAMA_VOCAB_TYPE_NONE:
            raise ModelError("the file has no vocabulary", where=str(path))
        raw = text.encode()
        ids = (lib.llama_token * (len(raw) + 2))()
        count = lib.llama_tokenize(vocabulary, raw, len(raw), ids, len(ids), True, False)
        if count < 0:
            raise ToolError(f"libllama cannot tokenize {len(raw)} bytes", where=str(path))
        bos = lib.llama_vocab_bos(vocabulary) if lib.llama_vocab_get_add_bos(vocabulary) else None
        return np.array(ids[:count], dtype=np.int64), bos
    finally:
        lib.llama_model_free(model)


class LlamaModel:
    """A loaded GGUF model with a context that grows as longer texts come.

    Args:
        path: the GGUF file; it is validated before libllama sees it.
        threads: CPU threads, None for libllama's default.
        context: initial context length, tokens.
        kv_type: what keys and values are kept as: ``f16``, ``q8_0`` or ``q4_0``.
        on_node: libllama's evaluation callback: told the address of each node of the graph before
            it is computed (returns whether it is wanted), and again after, if it was (returns
            whether to go on). The model then stays in the CPU's memory.

    Attributes:
        vocab_size: V.
        trained_context: longest context the model was trained for, tokens.
        file_type: e.g. ``Q5_K_M``; "" if the file does not say.

    Raises:
        ModelError: not a loadable GGUF.
        MissingToolError: no libllama.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        context: int = 512,
        kv_type: str = DEFAULT_KV_TYPE,
        on_node: Callable[[int, bool, object], bool] | None = None,
    ) -> None:
        self.file_type = open_gguf(path).file_type
        self._lib = library()
        self.path = path
        self._threads = threads
        self._kv_type = kv_type
        self._context_length = 0
        self._context: Any = None
        self._model: Any = None
        self._on_node: Any = None  # must outlive the context
        _log_lines.clear()
        parameters = self._lib.llama_model_default_params()
        if on_node is not None:
            self._on_node = self._lib.ggml_backend_sched_eval_callback(on_node)
            parameters.n_gpu_layers = 0
        with _interrupts_deferred():
            self._model = self._lib.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._model:
            raise ModelError(f"libllama cannot load it: {last_words()}", where=str(path))
        vocabulary = self._lib.llama_model_get_vocab(self._model)
        self._vocabulary = vocabulary
        self.vocab_size = int(self._lib.llama_vocab_n_tokens(vocabulary))
        self.trained_context = int(self._lib.llama_model_n_ctx_train(self._model))
        self._initial_context = min(context, self.trained_context)
        if kv_type != DEFAULT_KV_TYPE:  # whether the model's heads can be cut into its blocks
            self._open_context(self._initial_context)

    def ends(self, token: int) -> bool:
        """Whether a token ends a generation."""
        return bool(self._lib.llama_vocab_is_eog(self._vocabulary, token))

    def pieces(self) -> list[str | None]:
        """Token id → text of an ordinary token as the vocabulary stores it, None of any other."""
        lib, vocabulary = self._lib, self._vocabulary
        if lib.llama_vocab_type(vocabulary) == lib.LLAMA_VOCAB_TYPE_NONE:
            return [None] * self.vocab_size
        ordinary = lib.LLAMA_TOKEN_ATTR_NORMAL
        return [
            lib.llama_vocab_get_text(vocabulary, i).decode("utf-8", "replace")
            if lib.llama_vocab_get_attr(vocabulary, i) & ordinary
            else None
            for i in range(self.vocab_size)
        ]

    def begin(self, length: int) -> None:
        """Start a new text: forget the tokens so far and make room for ``length``.

        Raises:
            DataError: longer than the model's trained context.
        """
        if length > self.trained_context:
            raise DataError(
                f"{length} tokens are more than the model's context of {self.trained_context}",
                where=str(self.path),
                remedy=f"Use at most {self.trained_context} tokens of each text: --set max_tokens="
                f"{self.trained_context}; qc has windows, too: --ctx {self.trained_context}.",
            )
        if self._context is None or length > self._context_length:
            self._open_context(max(length, self._initial_context))
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def decode(
        self, tokens: npt.NDArray[np.int64], position: int, first: int = 0
    ) -> npt.NDArray[np.float32]:
        """Feed tokens that follow ``position`` earlier ones; logits of them from ``first`` on.

        Returns:
            [n − first, V] float32, a view of libllama's memory, valid until the next call.

        Raises:
            DataError: a token is not in the vocabulary.
            ToolError: libllama reports an error.
        """
        count = int(tokens.size)
        outside = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
        if outside.size:
            raise DataError(
                f"token {int(outside[0])} is not in the model's vocabulary of {self.vocab_size}",
                where=str(self.path),
                remedy="Give the tokenizer that belongs to this model.",
            )
        with self._batch(tokens, position, first) as batch:
            code = self._lib.llama_decode(self._context, batch)
        if code != 0:
            raise ToolError(
                f"libllama cannot decode (code {code}): {last_words()}", where=str(self.path)
            )
        pointer = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(count - first, self.vocab_size))

    def see(
        self,
        rows: npt.NDArray[np.float32],
        positions: npt.NDArray[np.int64],
        first: int = 0,
        *,
        both_ways: bool = False,
    ) -> npt.NDArray[np.float32]:
        """Feed embeddings in the place of tokens; logits of them from ``first`` on.

        Args:
            rows: [n, D] embeddings.
            positions: [n], or [3, n] of a multi-axis RoPE: time, height, width.
            first: as of :meth:`decode`.
            both_ways: each of them attends to all of them.

        Returns:
            [n − first, V] float32, a view of libllama's memory, valid until the next call.

        Raises:
            ModelError: the model takes embeddings of another width.
            ToolError: libllama reports an error.
        """
        width = int(self._lib.llama_model_n_embd_inp(self._model))
        if rows.shape[1] != width:
            raise ModelError(
                f"it takes embeddings of {width} features, the pictures' have {rows.shape[1]}",
                where=str(self.path),
                remedy="Give the vision tower and the text model of one checkpoint.",
            )
        count = int(rows.shape[0])
        axes = self._axes()
        if positions.ndim == 1:
            positions = np.tile(positions, (3, 1))
        planes = np.zeros((axes, count), dtype=np.int32)
        planes[: min(3, axes)] = positions[: min(3, axes)]
        if both_ways:
            self._lib.llama_set_causal_attn(self._context, False)
        try:
            with self._embedding_batch(rows, planes, first) as batch:
                code = self._lib.llama_decode(self._context, batch)
        finally:
            if both_ways:
                self._lib.llama_set_causal_attn(self._context, True)
        if code != 0:
            raise ToolError(
                f"libllama cannot decode embeddings (code {code}): {last_words()}",
                where=str(self.path),
            )
        pointer = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(count - first, self.vocab_size))

    def _axes(self) -> int:
        """Positions of one embedding: four (time, height, width, unused) of a multi-axis RoPE."""
        kinds = (self._lib.LLAMA_ROPE_TYPE_MROPE, self._lib.LLAMA_ROPE_TYPE_IMROPE)
        return 4 if self._lib.llama_model_rope_type(self._model) in kinds else 1

    @contextmanager
    def _embedding_batch(
        self, rows: npt.NDArray[np.float32], planes: npt.NDArray[np.int32], first: int
    ) -> Iterator[Any]:
        """A batch whose positions are planes one after another, for which libllama's own allocation
        has no room."""
        count = rows.shape[0]
        batch = self._lib.llama_batch_init(count, rows.shape[1], 1)
        kind = type(batch.pos)
        own = ctypes.cast(batch.pos, ctypes.c_void_p).value or 0  # batch.pos is a view, no copy
        places = np.ascontiguousarray(planes.reshape(-1), dtype=np.int32)
        try:
            batch.n_tokens = count
            ctypes.memmove(batch.embd, np.ascontiguousarray(rows).ctypes.data, rows.nbytes)
            batch.pos = places.ctypes.data_as(kind)
            for i in range(count):
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = i >= first
            yield batch
        finally:
            batch.pos = ctypes.cast(own, kind)
            self._lib.llama_batch_free(batch)

    @contextmanager
    def _batch(self, tokens: npt.NDArray[np.int64], position: int, first: int) -> Iterator[Any]:
        count = int(tokens.size)
        batch = self._lib.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for i, token in enumerate(tokens.tolist()):
                batch.token[i] = token
                batch.pos[i] = position + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = i >= first
            yield batch
        finally:
            self._lib.llama_batch_free(batch)

    def _open_context(self, length: int) -> None:
        if self._context is not None:
            self._lib.llama_free(self._context)
        parameters = self._lib.llama_context_default_params()
        parameters.n_ctx = length
        parameters.n_batch = length  # libllama aborts the process when more come in one call
        parameters.n_ubatch = min(length, _COMPUTED_AT_ONCE)
        parameters.no_perf = True
        if self._kv_type != DEFAULT_KV_TYPE:
            kind = getattr(self._lib, f"GGML_TYPE_{self._kv_type.upper()}")
            parameters.type_k = parameters.type_v = kind
            # values are only quantized where attention is computed without its matrix
            parameters.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if self._on_node is not None:
            parameters.cb_eval = self._on_node
            parameters.offload_kqv = parameters.op_offload = False
        if self._threads is not None:
            parameters.n_threads = parameters.n_threads_batch = self._threads
        with _interrupts_deferred():
            self._context = self._lib.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise ToolError(
                f"libllama cannot make a context of {length} tokens: {last_words()}",
                where=str(self.path),
            )
        self._context_length = length

    def close(self) -> None:
        """Free model and context."""
        if self._context is not None:
            self._lib.llama_free(self._context)
            self._context = None
        if self._model is not None:
            self._lib.llama_model_free(self._model)
            self._model = None
