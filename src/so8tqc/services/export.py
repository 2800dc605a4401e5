"""Export: convert a model directory to GGUF and compare every tensor with its source."""

from __future__ import annotations

import math
from dataclasses import replace

from so8tqc.artifacts import atomic_file, file_ref, remove_leftovers, require_space
from so8tqc.checkpoints.provenance import read_provenance
from so8tqc.checkpoints.safetensors_index import Checkpoint, open_checkpoint
from so8tqc.config import ExportConfig, ExportType
from so8tqc.llama.converter import convert
from so8tqc.llama.gguf_file import open_gguf
from so8tqc.llama.vendor import find_converter
from so8tqc.progress import SILENT, Progress
from so8tqc.records import Record, Stopwatch, jsonable, overall, versions
from so8tqc.services.export_proof import compare_tensors, proof_checks

_BYTES_PER_WEIGHT: dict[ExportType, float] = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32}


def export(config: ExportConfig, progress: Progress = SILENT) -> Record:
    """Convert a model directory with llama.cpp's converter and prove the result.

    Record metrics: ``architecture``, ``types`` (GGML type → tensors), ``tensors``, ``bytes``,
    ``bits_per_weight``, ``rearranged`` (what was done → tensors), ``baked`` (whether the model
    directory says so), ``converter``.

    Raises:
        ModelError: the directory is no model, or what the converter wrote is no GGUF.
        ToolError: no converter, it failed, or the disk has no room.
    """
    watch = Stopwatch()
    checkpoint = open_checkpoint(config.model)
    converter = find_converter(config.llama_cpp)
    provenance = read_provenance(config.model)
    need = _bytes_needed(checkpoint, config.type)
    require_space(config.out.parent, need, "the export needs about {}")
    remove_leftovers(config.out.parent)
    log = config.out.with_name(config.out.name + ".log")
    with atomic_file(config.out) as temporary:
        convert(converter, config.model, temporary, config.type, log, progress)
        written = open_gguf(temporary)  # what cannot be read back must not appear
    gguf = replace(written, path=config.out)  # reading it again would take as long again
    comparison = compare_tensors(checkpoint, gguf, progress)
    checks = proof_checks(comparison)
    return Record(
        kind="export",
        verdict=overall(checks),
        checks=tuple(checks),
        metrics={
            "architecture": gguf.architecture,
            "file_type": gguf.file_type,
            "types": jsonable(gguf.types),
            "tensors": len(gguf.tensors),
            "bytes": config.out.stat().st_size,
            "bits_per_weight": gguf.bits_per_weight,
            "rearranged": jsonable(comparison.arrangements),
            "baked": provenance is not None,
            "converter": converter.revision,
        },
        inputs={"model": file_ref(config.model)},
        outputs={"gguf": file_ref(config.out)},
        config=config.model_dump(mode="json"),
        versions=versions("gguf", "transformers", "torch"),
        run=watch.info(),
    )


def _bytes_needed(checkpoint: Checkpoint, type_: ExportType) -> float:
    weights = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
    return weights * _BYTES_PER_WEIGHT[type_]
