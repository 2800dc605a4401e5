"""Quantize: one GGUF to several types by libllama, each file read back and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple, TypedDict

from so8tqc.config import QuantizeConfig
from so8tqc.disk.atomic import remove_leftovers
from so8tqc.disk.digests import file_ref
from so8tqc.disk.locks import claim_folder, exclusive
from so8tqc.gguf.file import GGUFFile, open_gguf
from so8tqc.llama.imatrix import ImportanceMatrix, read_imatrix, tensors_without_importance
from so8tqc.llama.quantizer import Quantizer
from so8tqc.progress import SILENT, Progress
from so8tqc.records import Record, Stopwatch, jsonable, overall, versions
from so8tqc.services.quantize.derivation import derivation
from so8tqc.services.quantize.files import PlannedFile, quantize_files, workers
from so8tqc.services.quantize.imatrix import compute_imatrix
from so8tqc.services.quantize.proof import fallback_notices, fallbacks
from so8tqc.services.quantize.recipe import (
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


@exclusive(claim_folder)
def quantize(config: QuantizeConfig, progress: Progress = SILENT) -> Record:
    """Quantize to every type asked for; each file appears complete or not at all.

    Record metrics: ``files``: name → {type, path, bytes, bits_per_weight, types (GGML type →
    tensors), fallbacks (tensor → type, where the columns forbid the recipe's), tensors (tensor →
    {type, bits_per_weight, relative_error, fallback: {wanted, stored, columns, block}}),
    layer_error and attention_output_error (layer → ‖Q − W‖/‖W‖)}; ``library``; ``derivation``
    (see :class:`so8tqc.services.quantize.derivation.Derivation`); with an importance matrix
    ``imatrix``:
    {tensors, chunks, without (tensors it says nothing about), silent_columns, unseen_experts
    (tensor → number)}. ``run.measured`` has ``workers``: {count, threads (of each), bytes (that
    each may need)}, which depend on this machine.

    Raises:
        ModelError: the input is no GGUF, is already quantized or one part of several; or the
            importance matrix is none, or another model's.
        InputError: libllama does not know a type, a type needs an importance matrix, or a
            choice of a tensor's type has no effect.
        ConfigError: an output would replace the input, or no PATTERN=TYPE.
        ToolError: no libllama, it failed, or the disk is full.
    """
    watch = Stopwatch()
    with ExitStack() as processes:
        quantizers = [processes.enter_context(closing(Quantizer()))]  # starts during what follows
        source = open_gguf(config.gguf)
        requantized = refuse_source(source, allow_requantize=config.allow_requantize)
        work = _prepare(config, source, quantizers[0], progress)
        hands = workers(config, source)
        while len(quantizers) < hands["count"]:
            quantizers.append(processes.enter_context(closing(Quantizer())))
        reference, results = quantize_files(
            source, work.files, quantizers, hands["threads"], progress
        )
    files = {Path(result.described["path"]).name: result.described for result in results.values()}
    checks = [check for result in results.values() for check in result.checks]
    inputs = {"gguf": reference}
    written = {name: result.file for name, result in results.items()}
    metrics = {
        "files": jsonable(files),
        "derivation": jsonable(
            derivation({Path(r.file.path).name: r.digests for r in results.values()})
        ),
        "library": versions("llama-cpp-python")["llama-cpp-python"],
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
        run=watch.info().model_copy(update={"measured": {"workers": jsonable(hands)}}),
    )


class _Work(NamedTuple):
    files: tuple[PlannedFile, ...]
    matrix: ImportanceMatrix | None


def _prepare(
    config: QuantizeConfig, source: GGUFFile, quantizer: Quantizer, progress: Progress
) -> _Work:
    """Everything that can fail before the first expensive byte, then the importance matrix."""
    files = outputs(config)
    remove_leftovers(config.out)
    given = None if config.imatrix in (None, AUTO) else Path(str(config.imatrix))
    matrix = None if given is None else read_imatrix(given)
    if matrix is not None:
        tensors_without_importance(matrix, source)
    planned = _plan(config, source, quantizer, files, given)
    if config.imatrix != AUTO:
        _require_importance(planned, source, matrix)
    require_room(config.out, source, [file.tensors for file in planned])
    if config.imatrix == AUTO:
        matrix = compute_imatrix(
            source, config.imatrix_data, config.out / f"{stem(config.gguf)}-imatrix.gguf",
            threads=config.threads, progress=progress,
        )  # fmt: skip
        # mixtures depend on having one
        planned = _plan(config, source, quantizer, files, matrix.path)
        _require_importance(planned, source, matrix)
    return _Work(planned, matrix)


def _plan(
    config: QuantizeConfig,
    source: GGUFFile,
    quantizer: Quantizer,
    files: Sequence[Output],
    imatrix: Path | None,
) -> tuple[PlannedFile, ...]:
    chosen = overrides(config, source)
    planned = []
    for output in files:
        how = recipe(config, output, chosen, imatrix)
        tensors = quantizer.plan(source.path, how)
        require_effect(output, chosen, tensors)
        head_type = chosen.head[0] if chosen.head else None
        fell = fallbacks(tensors, source, output.name, head_type)
        planned.append(PlannedFile(output, how, tensors, fell))
    return tuple(planned)


def _require_importance(
    planned: Sequence[PlannedFile], source: GGUFFile, matrix: ImportanceMatrix | None
) -> None:
    for file in planned:
        require_importance(file.output, file.tensors, source, matrix)


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
