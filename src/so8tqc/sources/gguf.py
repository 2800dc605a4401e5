"""Logits of a GGUF file through libllama, fed token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from so8tqc.errors import DataError, MissingToolError, ModelError, ToolError
from so8tqc.llama.isolated import IsolatedModel
from so8tqc.llama.kv_types import DEFAULT_KV_TYPE
from so8tqc.sources.protocol import TokenIds
from so8tqc.sources.seen import Images, images_of
from so8tqc.threads import WORKERS

SEEN_AT_ONCE = 128
"""Tokens of text between pictures that are decoded in one call: their logits are held together."""

if TYPE_CHECKING:
    import torch


class GGUFSource:
    """A GGUF model as a logit source, in a process of its own.

    Args:
        path: the file.
        name: label for reports.
        threads: CPU threads, None for libllama's default.
        context: context length to start with, tokens; it grows when a longer text comes.
        kv_type: what libllama keeps keys and values as.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        *,
        threads: int | None = None,
        context: int = 512,
        kv_type: str = DEFAULT_KV_TYPE,
    ) -> None:
        self.name = name
        self.path = path
        self._model = IsolatedModel(path, threads=threads, context=context, kv_type=kv_type)
        self.vocab_size = self._model.vocab_size

    @property
    def context_length(self) -> int:
        """Longest context the model was trained for, tokens."""
        return self._model.trained_context

    @property
    def file_type(self) -> str:
        """How the file is quantized, e.g. ``Q5_K_M``; "" if it does not say."""
        return self._model.file_type

    def pieces(self) -> list[str | None]:
        """Token id → text of an ordinary token as the file stores it, None of any other."""
        return self._model.pieces()

    def logits(self, tokens: TokenIds, rows: int, first: int = 0) -> Iterator[torch.Tensor]:
        """See :class:`so8tqc.sources.protocol.LogitSource`."""
        import torch

        self._model.begin(tokens.size)
        images = images_of(tokens)
        if images is not None:
            for block in _in_blocks(self._seen(tokens, images), rows, first):
                yield torch.from_numpy(block)
            return
        start = 0
        for stop in range(min(first + rows, tokens.size), tokens.size + rows, rows):
            part = tokens[start:stop]
            yield torch.from_numpy(self._model.decode(part, start, max(0, first - start)))
            start += part.size

    def _seen(self, tokens: TokenIds, images: Images) -> Iterator[npt.NDArray[np.float32]]:
        """The logits of a text with pictures, [n, V] for n positions at a time, in order."""
        given = images.embedded
        if given is None:
            raise DataError(
                "a GGUF file is shown pictures as a vision tower's embeddings, and no model "
                "directory is there to make them",
                where=str(self.path),
                remedy="Give --tokenizer MODEL_DIRECTORY, with its weights.",
            )
        plain = np.asarray(tokens)
        places = np.arange(plain.size) if given.positions is None else given.positions
        done, row = 0, 0
        for start, stop in (*images.spans(), (plain.size, plain.size)):
            for at in range(done, start, SEEN_AT_ONCE):
                part = plain[at : min(at + SEEN_AT_ONCE, start)]
                yield self._model.decode(part, int(places[..., at].max()))
            if stop > start:
                rows = given.rows[row : row + stop - start]
                yield self._model.see(rows, places[..., start:stop], both_ways=given.both_ways)
                row += stop - start
            done = stop

    def steps(
        self, tokens: TokenIds, max_new_tokens: int, pick: Callable[[torch.Tensor], int]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Generate freely: (chosen token, the logits [V] it was chosen from), step by step.

        Args:
            tokens: [T] the prompt.
            max_new_tokens: at most so many steps; fewer when the model ends its text.
            pick: chooses the next token from [V] logits.
        """
        import torch

        self._model.begin(tokens.size + max_new_tokens)
        position = 0
        logits = torch.empty(0)
        for start in range(0, tokens.size, 512):
            part = tokens[start : start + 512]
            logits = torch.from_numpy(self._model.decode(part, start, part.size - 1)[0].copy())
            position = start + part.size
        for _ in range(max_new_tokens):
            token = pick(logits)
            yield token, logits
            if self._model.ends(token):
                return
            step = np.array([token], dtype=np.int64)
            logits = torch.from_numpy(self._model.decode(step, position)[0].copy())
            position += 1

    def close(self) -> None:
        """Free the model."""
        self._model.close()


def _in_blocks(
    parts: Iterable[npt.NDArray[np.float32]], rows: int, first: int
) -> Iterator[npt.NDArray[np.float32]]:
    """Blocks of ``rows`` rows of consecutive parts, without the ``first`` ones; copies."""
    waiting: list[npt.NDArray[np.float32]] = []
    held = 0
    for part in parts:
        skipped = min(first, part.shape[0])
        first -= skipped
        waiting.append(part[skipped:].copy())
        held += waiting[-1].shape[0]
        while held >= rows:
            whole = np.concatenate(waiting)
            yield whole[:rows]
            waiting, held = [whole[rows:]], held - rows
    if held:
        yield np.concatenate(waiting)


class Opened(NamedTuple):
    """Sources that could be opened, and name → why a file could not."""

    sources: list[GGUFSource]
    failed: dict[str, ModelError | ToolError]


def open_each(
    files: Mapping[str, Path], *, threads: int | None, kv_types: Mapping[str, str] | None = None
) -> Opened:
    """Sources of several files, name → file, a few at a time.

    A file that libllama cannot load is no reason not to open the others. ``kv_types``: name → what
    keys and values are kept as, where it is not f16.

    Raises:
        MissingToolError: there is no libllama; those that were open are closed.
    """
    with ThreadPoolExecutor(max_workers=WORKERS) as pool:
        opening = {
            name: pool.submit(
                GGUFSource,
                path,
                name,
                threads=threads,
                kv_type=(kv_types or {}).get(name, DEFAULT_KV_TYPE),
            )
            for name, path in files.items()
        }
    opened = [f.result() for f in opening.values() if f.exception() is None]
    failed: dict[str, ModelError | ToolError] = {}
    for name, future in opening.items():
        match future.exception():
            case None:
                continue
            case ModelError() | ToolError() as error if not isinstance(error, MissingToolError):
                failed[name] = error
            case other:
                _close(opened)
                raise other
    return Opened(opened, failed)


def open_together(files: Mapping[str, Path], *, threads: int | None) -> list[GGUFSource]:
    """As :func:`open_each`, all of them or none.

    Raises:
        ModelError, ToolError: as :class:`GGUFSource`; those that were open are closed.
    """
    opened, failed = open_each(files, threads=threads)
    if failed:
        _close(opened)
        raise next(iter(failed.values()))
    return opened


def _close(sources: Iterable[GGUFSource]) -> None:
    for source in sources:
        source.close()
