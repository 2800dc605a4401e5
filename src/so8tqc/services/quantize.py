"""Quantize: one GGUF to several types by libllama, each file read back and compared."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypedDict

from so8tqc.artifacts import atomic_file, file_ref, remove_leftovers, sha256_file
from so8tqc.config import QuantizeConfig
from so8tqc.errors import ToolError
from so8tqc.llama.gguf_file import GGUFFile, open_gguf
from so8tqc.llama.imatrix import ImportanceMatrix, read_imatrix, tensors_without_importance
from so8tqc.llama.quantizer import Job, PlannedTensor, Recipe, plan, quantize_file
from so8tqc.progress import SILENT, Progress
from so8tqc.records import Check, FileRef, Record, Stopwatch, jsonable, overall, versions
from so8tqc.services.derivation import derivation
from so8tqc.services.imatrix import compute_imatrix
from so8tqc.services.quantize_proof import (
    Fallback,
    QuantizedFile,
    describe,
    errors,
    fallback_notices,
    fallbacks,
    proof_checks,
)
from so8tqc.services.quantize_recipe import (
    Output,
    outputs,
    overrides,
    recipe,
    refuse_source,
    require_effect,
    require_importance,
    require_room,
    stem,
)
from so8tqc.sources.texts import data_paths

AUTO = "auto"
_WORKERS = 2
_WORKER_BYTES = 256 << 20
"""A worker's memory besides its buffers: interpreter, libllama, the file's header."""

_BUFFER_BYTES = 8
"""A worker's buffers, for each weight of the largest tensor: float32, and at most as much again."""


def quantize(config: QuantizeConfig, progress: Progress = SILENT) -> Record:
    """Quantize to every type asked for; each file appears complete or not at all.

    Record metrics: ``files``: name → {type, path, bytes, bits_per_weight, types (GGML type →
    tensors), fallbacks (tensor → type, where the columns forbid the recipe's), tensors (tensor →
    {type, bits_per_weight, relative_error, fallback: {wanted, stored, columns, block}}),
    layer_error and attention_output_error (layer → ‖Q − W‖/‖W‖)}; ``library``; ``derivation``
    (see :class:`so8tqc.services.derivation.Derivation`); ``workers``: {count, threads (of each),
    bytes (that each may need)}; with an importance matrix ``imatrix``: {tensors, chunks, without
    (tensors it says nothing about), silent_columns, unseen_experts (tensor → number)}.

    Raises:
        ModelError: the input is no GGUF, is already quantized or one part of several; or the
            importance matrix is none, or another model's.
        InputError: libllama does not know a type, a type needs an importance matrix, or a
            choice of a tensor's type has no effect.
        ConfigError: an output would replace the input, or no PATTERN=TYPE.
        ToolError: no libllama, it failed, or the disk is full.
    """
    watch = Stopwatch()
    source = open_gguf(config.gguf)
    requantized = refuse_source(source, allow_requantize=config.allow_requantize)
    work = _prepare(config, source, progress)
    workers = _workers(config, source)
    reference, results = _all(work, workers, progress)
    files = {Path(result.described["path"]).name: result.described for result in results.values()}
    checks = [check for result in results.values() for check in result.checks]
    inputs = {"gguf": reference}
    written = {name: result.file for name, result in results.items()}
    metrics = {
        "files": jsonable(files),
        "derivation": jsonable(derivation(Path(ref.path) for ref in written.values())),
        "library": versions("llama-cpp-python")["llama-cpp-python"],
        "workers": jsonable(workers),
    }
    notices = fallback_notices(files)
    if requantized:
        notices.append(
            f"The input was already quantized ({', '.join(sorted(requantized))}): its own errors "
            "stay, and those in this record are relative to it."
        )
    if work.matrix is not None:
        metrics["imatrix"] = jsonable(_coverage(work.matrix, source))
        notices += _importance_notices(work.matrix, source)
        (written if config.imatrix == AUTO else inputs)["imatrix"] = file_ref(work.matrix.path)
    if config.imatrix == AUTO:
        inputs |= {f"imatrix_data: {p.name}": file_ref(p) for p in data_paths(config.imatrix_data)}
    return Record(
        kind="quantize",
        verdict=overall(checks),
        checks=tuple(checks),
        metrics=metrics,
        notices=tuple(notices),
        inputs=inputs,
        outputs=written,
        config=config.model_dump(mode="json"),
        versions=versions("llama-cpp-python", "gguf"),
        run=watch.info(),
    )


@dataclass(frozen=True)
class _Planned:
    """One file to write, how, and what libllama says it will hold."""

    output: Output
    recipe: Recipe
    tensors: Mapping[str, PlannedTensor]
    fallbacks: Mapping[str, Fallback]


@dataclass(frozen=True)
class _Work:
    source: GGUFFile
    files: tuple[_Planned, ...]
    matrix: ImportanceMatrix | None


def _prepare(config: QuantizeConfig, source: GGUFFile, progress: Progress) -> _Work:
    """Everything that can fail before the first expensive byte, then the importance matrix."""
    files = outputs(config)
    remove_leftovers(config.out)
    given = None if config.imatrix in (None, AUTO) else Path(str(config.imatrix))
    matrix = None if given is None else read_imatrix(given)
    if matrix is not None:
        tensors_without_importance(matrix, source)
    planned = _plan(config, source, files, given)
    if config.imatrix != AUTO:
        _require_importance(planned, source, matrix)
    require_room(config.out, source, [file.tensors for file in planned])
    if config.imatrix == AUTO:
        matrix = compute_imatrix(
            source, config.imatrix_data, config.out / f"{stem(config.gguf)}-imatrix.gguf",
            threads=config.threads, progress=progress,
        )  # fmt: skip
        planned = _plan(config, source, files, matrix.path)  # mixtures depend on having one
        _require_importance(planned, source, matrix)
    return _Work(source, planned, matrix)


def _plan(
    config: QuantizeConfig, source: GGUFFile, files: Sequence[Output], imatrix: Path | None
) -> tuple[_Planned, ...]:
    chosen = overrides(config, source)
    recipes = [recipe(config, output, chosen, imatrix) for output in files]
    planned = []
    for output, how, tensors in zip(files, recipes, plan(source.path, recipes), strict=True):
        require_effect(output, chosen, tensors)
        head_type = chosen.head[0] if chosen.head else None
        fell = fallbacks(tensors, source, output.name, head_type)
        planned.append(_Planned(output, how, tensors, fell))
    return tuple(planned)


def _require_importance(
    planned: Sequence[_Planned], source: GGUFFile, matrix: ImportanceMatrix | None
) -> None:
    for file in planned:
        require_importance(file.output, file.tensors, source, matrix)


class _Workers(TypedDict):
    """How many files are made at a time."""

    count: int
    threads: int
    bytes: int


def _workers(config: QuantizeConfig, source: GGUFFile) -> _Workers:
    """Two workers where there are two files, two threads, and memory for both."""
    import psutil

    largest = max(tensor.elements for tensor in source.tensors.values())
    need = _WORKER_BYTES + _BUFFER_BYTES * largest
    threads = config.threads or os.cpu_count() or 1
    fits = psutil.virtual_memory().available >= _WORKERS * need
    count = _WORKERS if fits and threads >= _WORKERS and len(set(config.types)) > 1 else 1
    return {"count": count, "threads": threads // count, "bytes": need}


class _Result(NamedTuple):
    described: QuantizedFile
    checks: list[Check]
    file: FileRef


class _Children:
    """Processes under way, which the main thread may end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[str]] = []
        self._ended = False

    def add(self, process: subprocess.Popen[str]) -> None:
        with self._lock:
            self._processes.append(process)
            if self._ended:
                process.kill()

    def end(self) -> None:
        with self._lock:
            self._ended = True
            for process in self._processes:
                process.kill()

    def require(self) -> None:
        if self._ended:
            raise ToolError("interrupted")


def _all(work: _Work, workers: _Workers, progress: Progress) -> tuple[FileRef, dict[str, _Result]]:
    """The digest of the input, and every file: quantized, compared, published.

    While a file is compared, the next one is being quantized.
    """
    children, slots = _Children(), threading.Semaphore(workers["count"])
    results: dict[str, _Result] = {}
    # the temporaries outlive the threads that write them
    with ExitStack() as temporaries, ThreadPoolExecutor(workers["count"] + 2) as pool:
        publications: dict[Future[_Result], tuple[str, ExitStack]] = {}
        try:
            for file in work.files:
                publication = temporaries.enter_context(ExitStack())
                temporary = publication.enter_context(atomic_file(file.output.path))
                future = pool.submit(
                    _one, work.source, file, temporary, workers["threads"], slots, children,
                    progress,
                )  # fmt: skip
                publications[future] = (file.output.name, publication)
            reference = pool.submit(file_ref, work.source.path)
            for future in as_completed(publications):
                name, publication = publications[future]
                results[name] = future.result()
                publication.close()
            order = [file.output.name for file in work.files]
            return reference.result(), {name: results[name] for name in order}
        except BaseException:
            children.end()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _one(
    source: GGUFFile,
    file: _Planned,
    temporary: Path,
    threads: int,
    slots: threading.Semaphore,
    children: _Children,
    progress: Progress,
) -> _Result:
    name, path = file.output.name, file.output.path
    count = len(source.tensors)
    with slots, progress.task(f"quantizing to {name}", total=count, unit="tensors") as task:
        children.require()
        quantize_file(
            Job(source.path, temporary, file.recipe, threads),
            on_tensor=lambda tensor: task.advance(1, item=tensor),
            on_start=children.add,
        )
    result = open_gguf(temporary)  # what cannot be read back must not appear
    with progress.task(f"reading back {path.name}", total=count, unit="tensors") as task:

        def on_tensor(tensor: str) -> None:
            children.require()
            task.advance(1, item=tensor)

        found = errors(source, result, on_tensor, threads)
    size = temporary.stat().st_size
    result = replace(result, path=path)
    return _Result(
        describe(name, result, found, file.fallbacks, size),
        proof_checks(source, result, file.tensors, found, path.name),
        FileRef(path=str(path), sha256=sha256_file(temporary), bytes=size),
    )


class _Coverage(TypedDict):
    """What an importance matrix covers, as the record's metrics show it."""

    tensors: int
    chunks: int
    without: tuple[str, ...]
    silent_columns: Mapping[str, int]
    unseen_experts: Mapping[str, int]


def _coverage(matrix: ImportanceMatrix, source: GGUFFile) -> _Coverage:
    return {
        "tensors": len(matrix.means),
        "chunks": matrix.chunks,
        "without": tensors_without_importance(matrix, source),
        "silent_columns": matrix.silent_columns,
        "unseen_experts": matrix.unseen_experts,
    }


def _importance_notices(matrix: ImportanceMatrix, source: GGUFFile) -> list[str]:
    notices = []
    if without := tensors_without_importance(matrix, source):
        notices.append("No importance, so rounded without weights: " + ", ".join(without))
    if matrix.silent_columns:
        notices.append(
            "Columns whose inputs were all zero have their tensor's smallest importance: "
            + _numbers(matrix.silent_columns)
        )
    if matrix.unseen_experts:
        notices.append(
            "Experts that no token chose weigh all columns alike: "
            + _numbers(matrix.unseen_experts)
        )
    return notices


def _numbers(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{count} of {name}" for name, count in numbers.items())
