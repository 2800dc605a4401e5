"""Export: convert a model directory to GGUF and compare every tensor with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from so8tqc.artifacts import atomic_file, file_ref, remove_leftovers
from so8tqc.checkpoints.provenance import read_provenance
from so8tqc.checkpoints.safetensors_index import Checkpoint, load_tensor, open_checkpoint
from so8tqc.config import ExportConfig
from so8tqc.llama.converter import convert
from so8tqc.llama.gguf_file import GGUFFile, open_gguf
from so8tqc.llama.tensor_map import GENERATED, gguf_names, possible_values, stored_as
from so8tqc.llama.vendor import find_converter
from so8tqc.progress import SILENT, Progress
from so8tqc.records import Check, Record, Stopwatch, jsonable, judge, overall, skipped, versions


@dataclass(frozen=True)
class TensorComparison:
    """What became of the source tensors in the GGUF file.

    Attributes:
        equal: GGUF name → what was done to it (``unchanged``, …).
        different: GGUF names whose bytes are none of what a converter may make.
        missing: source tensors without a counterpart in the file.
        unmapped: source tensors that the name map does not know.
        extra: GGUF tensors that come from no source tensor.
    """

    equal: dict[str, str]
    different: tuple[str, ...]
    missing: tuple[str, ...]
    unmapped: tuple[str, ...]
    extra: tuple[str, ...]


def export(config: ExportConfig, progress: Progress = SILENT) -> Record:
    """Convert a model directory with llama.cpp's converter and prove the result.

    Record metrics: ``architecture``, ``types`` (GGML type → tensors), ``tensors``, ``bytes``,
    ``bits_per_weight``, ``rearranged`` (what was done → tensors), ``baked`` (whether the model
    directory says so), ``converter``.

    Raises:
        ModelError: the directory is no model.
        ToolError: no converter, or it failed.
    """
    watch = Stopwatch()
    checkpoint = open_checkpoint(config.model)
    converter = find_converter(config.llama_cpp)
    provenance = read_provenance(config.model)
    remove_leftovers(config.out.parent)
    log = config.out.with_name(config.out.name + ".log")
    with atomic_file(config.out) as temporary:
        convert(converter, config.model, temporary, config.type, log, progress)
    gguf = open_gguf(config.out)
    comparison = compare_tensors(checkpoint, gguf, progress)
    checks = _checks(comparison)
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
            "rearranged": jsonable(_counts(comparison.equal)),
            "baked": provenance is not None,
            "converter": converter.revision,
        },
        inputs={"model": file_ref(config.model)},
        outputs={"gguf": file_ref(config.out)},
        config=config.model_dump(mode="json"),
        versions=versions("gguf", "transformers", "torch"),
        run=watch.info(),
    )


def compare_tensors(
    checkpoint: Checkpoint, gguf: GGUFFile, progress: Progress = SILENT
) -> TensorComparison:
    """Compare every source tensor, renamed, rearranged and rounded, with the stored bytes."""
    config = _text_config(checkpoint.config)
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 0)
    names = gguf_names(checkpoint.tensors.keys(), gguf.architecture, layers)
    equal: dict[str, str] = {}
    different: list[str] = []
    missing: list[str] = []
    with progress.task("comparing tensors", total=len(names), unit="tensors") as task:
        for source, name in names.items():
            if name is not None and name in gguf.tensors:
                done = _explain(checkpoint, source, gguf, name, config)
                if done is None:
                    different.append(name)
                else:
                    equal[name] = done
            elif name is not None and not _is_tied_head(name, gguf):
                missing.append(source)
            task.advance(1, item=source)
    mapped = set(names.values())
    return TensorComparison(
        equal=equal,
        different=tuple(different),
        missing=tuple(missing),
        unmapped=tuple(source for source, name in names.items() if name is None),
        extra=tuple(n for n in gguf.tensors if n not in mapped and n not in GENERATED),
    )


def _explain(
    checkpoint: Checkpoint, source: str, gguf: GGUFFile, name: str, config: Mapping[str, Any]
) -> str | None:
    """What the converter did to a tensor, None if nothing known explains its bytes."""
    tensor = gguf.tensors[name]
    values = load_tensor(checkpoint.tensors[source]).float().numpy()
    for done, candidate in possible_values(values, name, config):
        if candidate.size != tensor.elements:
            continue
        expected = stored_as(candidate.reshape(tensor.shape), tensor.type)
        if np.array_equal(expected.reshape(-1), tensor.data.reshape(-1), equal_nan=False):
            return done
    return None


def _checks(comparison: TensorComparison) -> list[Check]:
    total = len(comparison.equal) + len(comparison.different)
    checks = [
        judge(
            "export.tensors",
            len(comparison.different),
            0,
            detail=f"{len(comparison.equal)} of {total} tensors equal their source, rounded to "
            f"the stored type; different: {_names(comparison.different)}",
        ),
        judge(
            "export.missing",
            len(comparison.missing),
            0,
            detail="Source tensors that the file lacks: " + _names(comparison.missing),
        ),
        judge(
            "export.extra",
            len(comparison.extra),
            0,
            detail="Tensors that come from no source tensor: " + _names(comparison.extra),
        ),
    ]
    if comparison.unmapped:
        checks.append(
            skipped(
                "export.unmapped",
                f"{len(comparison.unmapped)} source tensors have names that gguf-py's map does not "
                f"know, so they were not compared: {_names(comparison.unmapped)}",
            )
        )
    return checks


def _is_tied_head(name: str, gguf: GGUFFile) -> bool:
    """A tied output head is left out; llama.cpp then uses the token embedding."""
    return name == "output.weight" and "output.weight" not in gguf.tensors


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _counts(done: Mapping[str, str]) -> dict[str, int]:
    values = list(done.values())
    return {what: values.count(what) for what in sorted(set(values))}


def _names(names: tuple[str, ...]) -> str:
    return (", ".join(names[:5]) + (" …" if len(names) > 5 else "") or "none") + "."


def default_name(model: Path, type_: str) -> str:
    """``NAME-F16.gguf`` for a model directory."""
    return f"{model.name}-{type_.upper()}.gguf"
