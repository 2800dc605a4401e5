"""Tensors of a file compared with their sources while libllama still writes the file."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np

from so8tqc.gguf.file import GGUFFile, GGUFTensor, aligned, block_layout
from so8tqc.llama.quantizer import PlannedTensor
from so8tqc.services.quantize.proof import SquaredError, as_stored, squared_error

_REWRITTEN = ("general.quantization_version", "general.file_type")
"""Keys that libllama sets: where an input has them already, the output's header is as long."""


class Compared(NamedTuple):
    """What is known of a stored tensor.

    Attributes:
        error: against its source, None where that has no tensor of the name and shape.
        sha256: of its stored bytes.
    """

    error: SquaredError | None
    sha256: str


class _Place(NamedTuple):
    name: str
    type: str
    offset: int
    bytes: int

    @property
    def end(self) -> int:
        return self.offset + self.bytes


class StreamedProof:
    """Reads back what libllama writes, a tensor as soon as it is complete.

    libllama appends tensor after tensor and writes the header, for which it has left room, last.
    So a tensor is complete when the file is long enough; where it begins is known from the plan.
    That is an expectation: :meth:`finish` holds it against the header, and what lies elsewhere or
    has another type than expected is read again. A wrong one costs time, and nothing else.

    Args:
        source: the input.
        planned: what libllama says it will write, in that order.
        path: the file that it writes.
        pool: where to compare.
    """

    def __init__(
        self, source: GGUFFile, planned: Mapping[str, PlannedTensor], path: Path, pool: Executor
    ) -> None:
        self._source, self._path, self._pool = source, path, pool
        self._expected = deque(_places(source, planned))
        self._begun: dict[_Place, Future[Compared]] = {}

    def advance(self) -> None:
        """Begin with the tensors that are complete by now."""
        size = self._path.stat().st_size
        if not (self._expected and self._expected[0].end <= size):
            return
        with self._path.open("rb") as stream:
            written = mmap(stream.fileno(), size, access=ACCESS_READ)  # as long as its tensors
        while self._expected and self._expected[0].end <= size:
            place = self._expected.popleft()
            self._begun[place] = self._pool.submit(self._compare, self._tensor(place, written))

    def finish(self, result: GGUFFile) -> Iterator[tuple[str, Compared]]:
        """Every tensor of the complete file.

        Args:
            result: the file, opened after libllama has ended.
        """
        futures = {}
        for name, tensor in result.tensors.items():
            place = _Place(name, tensor.type, tensor.offset, tensor.bytes)
            same_shape = name in self._source.tensors and (
                as_stored(self._source.tensors[name].shape) == as_stored(tensor.shape)
            )
            futures[name] = (
                self._begun[place]
                if place in self._begun and same_shape
                else self._pool.submit(self._compare, tensor)
            )
        for name, future in futures.items():
            yield name, future.result()

    def _tensor(self, place: _Place, written: mmap) -> GGUFTensor:
        """A tensor of a file without a header."""
        stored = np.frombuffer(written, np.uint8, place.bytes, place.offset)
        shape = self._source.tensors[place.name].shape
        return GGUFTensor(place.name, place.type, shape, place.bytes, place.offset, stored)

    def _compare(self, after: GGUFTensor) -> Compared:
        before = self._source.tensors.get(after.name)
        return Compared(
            squared_error(before, after)
            if before is not None and as_stored(before.shape) == as_stored(after.shape)
            else None,
            after.sha256,
        )


def _places(source: GGUFFile, planned: Mapping[str, PlannedTensor]) -> Iterator[_Place]:
    """The ranges where tensors will lie; none where the header's length is not known beforehand."""
    if len(source.parts) > 1 or not all(key in source.fields for key in _REWRITTEN):
        return
    from gguf import GGUF_DEFAULT_ALIGNMENT

    offset = min(tensor.offset for tensor in source.tensors.values())
    for name, tensor in planned.items():
        block, size = block_layout(tensor.type)
        length = source.tensors[name].elements // block * size
        yield _Place(name, tensor.type, offset, length)
        offset += aligned(length, GGUF_DEFAULT_ALIGNMENT)
