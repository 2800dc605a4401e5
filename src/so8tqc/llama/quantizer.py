"""Quantization by libllama, in a process of its own: first planned, then done."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from so8tqc.errors import InputError, ToolError
from so8tqc.llama.child import KEPT_LINES, QUIET_ABORT, ending, reason, remedy, spawn
from so8tqc.llama.libllama import library
from so8tqc.llama.quantize_worker import DONE_MARK

WORKER = (sys.executable, "-P", "-m", "so8tqc.llama.quantize_worker")

_PREFIXES = ("MOSTLY_", "ALL_")
_WITHOUT_RECIPE = frozenset({"NVFP4"})
"""File types that libllama names and reads, but has no way to write."""

_NOT_STORED = frozenset({"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"})
"""GGML types that hold intermediate values or integers, never a model's weights."""

_TENSOR = re.compile(r"^\[\s*\d+/\s*\d+\]\s+(\S+)")
_PLANNED = re.compile(
    r"^\[\s*\d+/\s*\d+\]\s+(?P<name>\S+)\s.*?type =\s*(?P<type>\w+), size =.*?"
    r"(?:-> .*\((?P<new>\w+)\))?$"
)
_FALLBACK = re.compile(
    r"^warning: (?P<name>\S+)\s+- ncols\s+(?P<columns>\d+) not divisible by\s+(?P<block>\d+) "
    r"\(required for type\s+(?P<wanted>\w+)\)"
)


@dataclass(frozen=True)
class Recipe:
    """How libllama is to quantize: a file type and what differs from it.

    Attributes:
        file_type: see :func:`resolve_type`.
        tensor_types: (regular expression, GGML type) pairs; the first that is found in a
            tensor's name decides. Only for file types that quantize.
        output_type: GGML type of ``output.weight`` (of the token embedding, if it serves as
            both), None for the recipe's.
        embedding_type: GGML type of the token embedding, None for the recipe's.
        pure: every matrix in the file type's default type, no mixture.
        requantize: whether the input may be quantized.
        imatrix: importance matrix, validated by the caller.
    """

    file_type: int
    tensor_types: tuple[tuple[str, int], ...] = ()
    output_type: int | None = None
    embedding_type: int | None = None
    pure: bool = False
    requantize: bool = False
    imatrix: Path | None = None


@dataclass(frozen=True)
class Job:
    """One call of ``llama_model_quantize``; ``destination`` None only plans it.

    Attributes:
        source: a GGUF, validated by the caller.
        destination: file to write (not atomic: give a temporary path).
        recipe: how.
        threads: CPU threads, None for all.
    """

    source: Path
    destination: Path | None
    recipe: Recipe
    threads: int | None = None

    def to_json(self) -> str:
        """The job as JSON, which the child process reads."""
        return json.dumps(asdict(self), default=str)


@dataclass(frozen=True)
class PlannedTensor:
    """What libllama will store for a tensor.

    Attributes:
        type: GGML type name.
        wanted: the type it would have taken, were the columns a multiple of ``block``.
        block: columns that one block of the wanted type packs.
    """

    type: str
    wanted: str | None = None
    block: int | None = None


def quantization_types() -> dict[str, int]:
    """Name (``Q5_K_M``) → libllama's file type: all it can write that gguf-py can read back."""
    from gguf import LlamaFileType

    lib = library()
    types: dict[str, int] = {}
    for name in dir(lib):
        known = name.removeprefix("LLAMA_FTYPE_")
        for prefix in _PREFIXES:
            short = known.removeprefix(prefix)
            if known.startswith(prefix) and known in LlamaFileType.__members__:
                types[short] = int(getattr(lib, name))
    return {name: value for name, value in types.items() if name not in _WITHOUT_RECIPE}


def tensor_types() -> dict[str, int]:
    """Name (``Q5_K``) → GGML type: all in which a single tensor can be stored."""
    from gguf import GGMLQuantizationType

    return {t.name: int(t) for t in GGMLQuantizationType if t.name not in _NOT_STORED}


def resolve_type(name: str) -> tuple[str, int]:
    """Canonical name and file type, whatever the case.

    Raises:
        InputError: libllama has no such type.
    """
    return _resolve(name, quantization_types(), "quantization type")


def resolve_tensor_type(name: str) -> tuple[str, int]:
    """Canonical name and GGML type of a single tensor, whatever the case.

    Raises:
        InputError: libllama has no such type.
    """
    return _resolve(name, tensor_types(), "tensor type")


def _resolve(name: str, known: dict[str, int], kind: str) -> tuple[str, int]:
    canonical = name.upper()
    if canonical not in known:
        raise InputError(
            f"libllama knows no {kind} {name!r}", remedy=f"It knows {', '.join(known)}."
        )
    return canonical, known[canonical]


class Quantizer:
    """A process in which libllama quantizes. It starts at once, and waits for jobs.

    A job that fails ends it; so does :meth:`end`, which another thread may call.
    """

    def __init__(self) -> None:
        self._said: deque[str] = deque(maxlen=KEPT_LINES)
        self._process = spawn(WORKER, subprocess.PIPE, QUIET_ABORT)

    def plan(self, source: Path, recipe: Recipe) -> dict[str, PlannedTensor]:
        """What libllama would make of a file: its dry run, which reads no weight.

        Returns:
            Tensor name → what would be stored, in the order of the file that would be written.

        Raises:
            ToolError: libllama reports an error, or dies.
        """
        tensors: dict[str, PlannedTensor] = {}
        fell: dict[str, tuple[str, int]] = {}
        for line in self._lines(Job(source, None, recipe)):
            if warned := _FALLBACK.search(line):
                fell[warned["name"]] = (warned["wanted"].upper(), int(warned["block"]))
            elif planned := _PLANNED.match(line):
                name = planned["name"]
                stored = PlannedTensor((planned["new"] or planned["type"]).upper())
                if name in fell:
                    stored = replace(stored, wanted=fell[name][0], block=fell[name][1])
                tensors[name] = stored
        return tensors

    def write(self, job: Job, on_tensor: Callable[[str], None]) -> None:
        """Run ``llama_model_quantize``.

        Args:
            job: what to do.
            on_tensor: told the name of every tensor that libllama has just quantized.

        Raises:
            ToolError: libllama reports an error, or dies.
        """
        for line in self._lines(job):
            if tensor := _TENSOR.match(line):
                on_tensor(tensor[1])

    def end(self) -> None:
        """Kill the process. Safe to call twice."""
        self._process.kill()

    def close(self) -> None:
        """End the process, and wait for it. Safe to call twice."""
        self.end()
        with suppress(OSError):  # what it was not there any more to read
            self._process.__exit__(None, None, None)

    def _lines(self, job: Job) -> Iterator[str]:
        """What libllama says during a job."""
        with suppress(BrokenPipeError):  # a dead process is noticed below
            _pipe(self._process.stdin).write(job.to_json() + "\n")
        for line in _pipe(self._process.stdout):
            if line.startswith(DONE_MARK):
                self._said.clear()  # only now: of a dead process every later job tells the cause
                return
            self._said.append(line.rstrip())
            yield line.rstrip("\n")
        status = self._process.wait()
        raise ToolError(
            f"libllama cannot quantize ({ending(status)}): {reason(filter(None, self._said))}",
            where=str(job.source),
            remedy=remedy(status),
        )


def _pipe(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise ToolError("the quantizing process has no pipes")
    return stream
