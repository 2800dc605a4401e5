"""The files of one call: quantized, compared while they are written, published when complete."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple

from so8tqc.config import QuantizeConfig
from so8tqc.disk.atomic import atomic_file
from so8tqc.disk.digests import file_ref, sha256_file
from so8tqc.errors import ModelError, ToolError
from so8tqc.gguf.file import GGUFFile, open_gguf
from so8tqc.llama.quantizer import Job, PlannedTensor, Quantizer, Recipe
from so8tqc.progress import Progress
from so8tqc.quantizers.hessians import MomentsFile
from so8tqc.record_kinds.quantize import Fallback, QuantizedFile, SolvedFile, Workers
from so8tqc.records import Check, FileRef
from so8tqc.services.quantize.proof import describe, proof_checks
from so8tqc.services.quantize.recipe import Output
from so8tqc.services.quantize.solver import solve_into
from so8tqc.services.quantize.stream import StreamedProof

_WORKERS = 2
_WORKER_BYTES = 256 << 20
"""A worker's memory besides its buffers: interpreter, libllama, the file's header."""

_BUFFER_BYTES = 8
"""A worker's buffers, for each weight of the largest tensor: float32, and at most as much again."""

_LOOK_SECONDS = 0.5
"""How long to wait at a time: a Ctrl-C that comes just before a wait is noticed at its end."""


@dataclass(frozen=True)
class PlannedFile:
    """One file to write, how, and what libllama says it will hold."""

    output: Output
    recipe: Recipe
    tensors: Mapping[str, PlannedTensor]
    fallbacks: Mapping[str, Fallback]


def workers(config: QuantizeConfig, source: GGUFFile) -> Workers:
    """Two workers where there are two files, two threads, and memory for both."""
    import psutil

    largest = max(tensor.elements for tensor in source.tensors.values())
    need = _WORKER_BYTES + _BUFFER_BYTES * largest
    threads = config.threads or os.cpu_count() or 1
    fits = psutil.virtual_memory().available >= _WORKERS * need
    count = _WORKERS if fits and threads >= _WORKERS and len(set(config.types)) > 1 else 1
    return Workers(count=count, threads=threads // count, bytes=need)


class Result(NamedTuple):
    """A published file: what it is, the verdicts, the digests of its tensors, what was solved."""

    described: QuantizedFile
    checks: list[Check]
    file: FileRef
    digests: dict[str, str]
    solved: SolvedFile | None


def quantize_files(
    source: GGUFFile,
    files: Sequence[PlannedFile],
    quantizers: Sequence[Quantizer],
    threads: int,
    progress: Progress,
    moments: MomentsFile | None = None,
) -> tuple[FileRef, dict[str, Result]]:
    """The digest of the input, and every file by its type: quantized, compared, published.

    Args:
        source: the input.
        files: what to write.
        quantizers: as many files are made at a time; on any exception they are ended.
        threads: of each quantizer.
        progress: told about both.
        moments: what tensors are solved for by, after libllama has written a file; None: they stay.

    Raises:
        ModelError: a tensor cannot be solved for.
        ToolError: libllama failed, or a file cannot be read back.
    """
    free: SimpleQueue[Quantizer] = SimpleQueue()
    for quantizer in quantizers:
        free.put(quantizer)
    finished: SimpleQueue[Future[Result]] = SimpleQueue()
    results: dict[str, Result] = {}
    # the temporaries outlive the threads that write them
    with (
        ExitStack() as temporaries,
        ThreadPoolExecutor(threads * len(quantizers)) as comparisons,
        ThreadPoolExecutor(len(quantizers) + 2) as pool,
    ):
        publications: dict[Future[Result], tuple[str, ExitStack]] = {}
        try:
            for file in files:
                publication = temporaries.enter_context(ExitStack())
                temporary = publication.enter_context(atomic_file(file.output.path))
                future = pool.submit(
                    _one, source, file, temporary, threads, free, comparisons, progress, moments
                )
                publications[future] = (file.output.name, publication)
                future.add_done_callback(finished.put)
            reference = pool.submit(file_ref, source.path)
            for _ in files:
                future = _next(finished)
                name, publication = publications[future]
                results[name] = future.result()
                publication.close()
            order = [file.output.name for file in files]
            return reference.result(), {name: results[name] for name in order}
        except BaseException:
            for quantizer in quantizers:
                quantizer.end()
            comparisons.shutdown(wait=False, cancel_futures=True)
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _read_back(temporary: Path, path: Path) -> GGUFFile:
    """Open a file just written: what cannot be read back must not appear."""
    try:
        return open_gguf(temporary)
    except ModelError as error:
        raise ToolError(
            f"what libllama wrote cannot be read back: {error.what}", where=str(path)
        ) from None


def _next(finished: SimpleQueue[Future[Result]]) -> Future[Result]:
    """The next file that is done. A Ctrl-C finds no lock held here that a thread needs to end."""
    while True:
        with suppress(Empty):
            return finished.get(timeout=_LOOK_SECONDS)


def _one(
    source: GGUFFile,
    file: PlannedFile,
    temporary: Path,
    threads: int,
    free: SimpleQueue[Quantizer],
    comparisons: Executor,
    progress: Progress,
    moments: MomentsFile | None,
) -> Result:
    name, path = file.output.name, file.output.path
    count = len(source.tensors)
    proof = StreamedProof(source, file.tensors, temporary, comparisons)
    quantizer = free.get()
    try:
        with progress.task(f"quantizing to {name}", total=count, unit="tensors") as task:

            def on_tensor(tensor: str) -> None:
                task.advance(1, item=tensor)
                if moments is None:  # else what libllama writes is not what will stay
                    proof.advance()

            quantizer.write(Job(source.path, temporary, file.recipe, threads), on_tensor)
    finally:
        free.put(quantizer)  # while the rest of this file is compared, the next one is quantized
    solved = None
    if moments is not None:
        kept = path.with_name(f".{path.name}.solved")
        solved = solve_into(temporary, source, moments, kept, threads, progress)
    result = _read_back(temporary, path)
    found, digests = {}, {}
    with progress.task(f"reading back {path.name}", total=count, unit="tensors") as task:
        for tensor, compared in proof.finish(result):
            task.advance(1, item=tensor)
            digests[tensor] = compared.sha256
            if compared.error is not None:
                found[tensor] = compared.error
    size = temporary.stat().st_size
    result = replace(result, path=path)
    return Result(
        describe(name, result, found, file.fallbacks, size),
        proof_checks(source, result, file.tensors, found, path.name),
        FileRef(path=str(path), sha256=sha256_file(temporary), bytes=size),
        digests,
        solved,
    )
