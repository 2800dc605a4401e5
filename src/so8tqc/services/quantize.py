"""Quantize: one GGUF to several types by libllama, each file read back and compared."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from so8tqc.artifacts import atomic_file, file_ref, remove_leftovers, require_space
from so8tqc.config import QuantizeConfig
from so8tqc.errors import ConfigError, ModelError
from so8tqc.llama.gguf_file import GGUFFile, open_gguf
from so8tqc.llama.imatrix import read_imatrix, tensors_without_importance
from so8tqc.llama.quantizer import quantize_file, resolve_type
from so8tqc.progress import SILENT, Progress
from so8tqc.records import Check, FileRef, Record, Stopwatch, jsonable, overall, versions
from so8tqc.services.derivation import derivation
from so8tqc.services.quantize_proof import (
    PLAIN_TYPES,
    QuantizedFile,
    describe,
    fallback_notices,
    proof_checks,
)

_PLAIN_BYTES = {"F32": 4.0, "F16": 2.0, "BF16": 2.0}
_QUANTIZED_BYTES = 34 / 32
"""Bytes of a weight in Q8_0, the largest of the quantized types."""


def quantize(config: QuantizeConfig, progress: Progress = SILENT) -> Record:
    """Quantize to every type asked for; files appear complete or not at all.

    Record metrics: ``files``: name → {type, path, bytes, bits_per_weight, types (GGML type →
    tensors), fallbacks (tensor → type, where the columns forbid the recipe's), tensors
    (tensor → type), attention_output_error (layer → ‖Q − W‖/‖W‖)}; ``library``; ``derivation``
    (see :class:`so8tqc.services.derivation.Derivation`); with an
    importance matrix ``imatrix``: {tensors, chunks, without (tensors it says nothing about)}.

    Raises:
        ModelError: the input is no GGUF, is already quantized or one part of several; or the
            importance matrix is none, or another model's.
        ConfigError: libllama does not know a type, or an output would replace the input.
        ToolError: no libllama, it failed, or the disk is full.
    """
    watch = Stopwatch()
    source = open_gguf(config.gguf)
    _refuse(source)
    outputs_by_type = _outputs(config)
    importance = None if config.imatrix is None else _importance(config.imatrix, source)
    need = _bytes_needed(source, outputs_by_type)
    require_space(config.out, need, "up to {} are needed")
    remove_leftovers(config.out)
    files: dict[str, QuantizedFile] = {}
    checks: list[Check] = []
    outputs: dict[str, FileRef] = {}
    for name, (file_type, path) in outputs_by_type.items():
        result = _one(config, source, name, file_type, path, progress)
        files[path.name] = describe(name, source, result)
        checks += proof_checks(source, result, path.name, progress)
        outputs[name] = file_ref(path)
    inputs = {"gguf": file_ref(config.gguf)}
    metrics = {
        "files": jsonable(files),
        "derivation": jsonable(derivation(Path(ref.path) for ref in outputs.values())),
        "library": versions("llama-cpp-python")["llama-cpp-python"],
    }
    notices = fallback_notices(files)
    if config.imatrix is not None and importance is not None:
        inputs["imatrix"] = file_ref(config.imatrix)
        metrics["imatrix"] = jsonable(importance)
        if importance["without"]:
            notices.append(
                "No importance, so rounded without weights: " + ", ".join(importance["without"])
            )
    return Record(
        kind="quantize",
        verdict=overall(checks),
        checks=tuple(checks),
        metrics=metrics,
        notices=tuple(notices),
        inputs=inputs,
        outputs=outputs,
        config=config.model_dump(mode="json"),
        versions=versions("llama-cpp-python", "gguf"),
        run=watch.info(),
    )


def stem(gguf: Path) -> str:
    """File name without ``.gguf`` and without the suffix of its own type."""
    return re.sub(r"-(F16|BF16|F32|AUTO)$", "", gguf.stem, flags=re.IGNORECASE)


def _one(
    config: QuantizeConfig,
    source: GGUFFile,
    name: str,
    file_type: int,
    path: Path,
    progress: Progress,
) -> GGUFFile:
    with (
        progress.task(f"quantizing to {name}", total=len(source.tensors), unit="tensors") as task,
        atomic_file(path) as temporary,
    ):
        quantize_file(
            config.gguf,
            temporary,
            file_type,
            threads=config.threads,
            imatrix=config.imatrix,
            on_tensor=lambda tensor: task.advance(1, item=tensor),
        )
        written = open_gguf(temporary)  # what cannot be read back must not appear
    return replace(written, path=path)  # reading it again would take as long again


class _Importance(TypedDict):
    """What an importance matrix covers, as the record's metrics show it."""

    tensors: int
    chunks: int
    without: tuple[str, ...]


def _importance(path: Path, source: GGUFFile) -> _Importance:
    matrix = read_imatrix(path)
    return {
        "tensors": len(matrix.means),
        "chunks": matrix.chunks,
        "without": tensors_without_importance(matrix, source),
    }


def _refuse(source: GGUFFile) -> None:
    quantized = {t.type for t in source.tensors.values()} - PLAIN_TYPES
    if quantized:
        raise ModelError(
            f"already quantized ({', '.join(sorted(quantized))}); quantizing it again loses more "
            "than quantizing the original",
            where=str(source.path),
            remedy="Give the F16, BF16 or F32 export.",
        )
    if int(source.fields.get("split.count", 1)) > 1:
        raise ModelError(
            "one part of a split model",
            where=str(source.path),
            remedy="Merge it first: llama-gguf-split --merge FIRST_PART OUT.gguf",
        )


def _outputs(config: QuantizeConfig) -> dict[str, tuple[int, Path]]:
    """Type → libllama's file type and the file to write, each type once."""
    outputs: dict[str, tuple[int, Path]] = {}
    for wanted in config.types:
        name, file_type = resolve_type(wanted)
        path = config.out / f"{stem(config.gguf)}-{name}.gguf"
        if path.resolve() == config.gguf.resolve():
            raise ConfigError(
                f"{name} would replace the input",
                where=str(config.gguf),
                remedy="Give another output directory.",
            )
        outputs[name] = (file_type, path)
    return outputs


def _bytes_needed(source: GGUFFile, outputs: dict[str, tuple[int, Path]]) -> float:
    weights = sum(tensor.elements for tensor in source.tensors.values())
    return sum(weights * _PLAIN_BYTES.get(name, _QUANTIZED_BYTES) for name in outputs)
