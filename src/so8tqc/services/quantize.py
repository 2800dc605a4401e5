"""Quantize: one GGUF to several types by libllama, each file read back and compared."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TypedDict

import numpy as np

from so8tqc.artifacts import atomic_file, file_ref, remove_leftovers
from so8tqc.config import QuantizeConfig
from so8tqc.errors import ModelError, ToolError
from so8tqc.llama.gguf_file import QUANTIZED_COLUMNS, GGUFFile, open_gguf
from so8tqc.llama.quantizer import library_version, quantize_file, resolve_type
from so8tqc.progress import SILENT, Progress
from so8tqc.records import Check, FileRef, Record, Stopwatch, jsonable, judge, overall, versions

_PLAIN_TYPES = {"F32", "F16", "BF16", "F64"}
_SUPER_BLOCK_TYPES = re.compile(r"^(I?Q\d.*_K|IQ(?!4_NL)\d.*|TQ.*|Q\d_K)$")
_RECIPE_OF_SUPER_BLOCKS = re.compile(r"_K|^IQ(?!4_NL)|^TQ")
_ATTENTION_OUTPUT = re.compile(r"^blk\.(\d+)\.attn_output\.weight$")


def quantize(config: QuantizeConfig, progress: Progress = SILENT) -> Record:
    """Quantize to every type asked for; files appear complete or not at all.

    Record metrics: ``files``: name → {type, path, bytes, bits_per_weight, types (GGML type →
    tensors), fallbacks (tensor → type, where columns are no multiple of 256), tensors
    (tensor → type), attention_output_error (layer → ‖Q − W‖/‖W‖)}; ``library``.

    Raises:
        ModelError: the input is no GGUF, or is already quantized.
        ConfigError: libllama does not know a type.
        ToolError: no libllama, it failed, or the disk is full.
    """
    watch = Stopwatch()
    source = open_gguf(config.gguf)
    _refuse_quantized(source)
    types = [resolve_type(name) for name in config.types]
    _preflight(config, len(types))
    remove_leftovers(config.out)
    files: dict[str, QuantizedFile] = {}
    checks: list[Check] = []
    outputs: dict[str, FileRef] = {}
    for name, file_type in types:
        path = config.out / f"{stem(config.gguf)}-{name}.gguf"
        with (
            progress.task(f"quantizing to {name}") as task,
            atomic_file(path) as temporary,
        ):
            quantize_file(config.gguf, temporary, file_type, threads=config.threads)
            task.advance(1, item=path.name)
        result = open_gguf(path)
        errors = _attention_output_errors(source, result)
        files[path.name] = _description(name, path, result, errors)
        checks += _checks(source, result, path.name, progress)
        outputs[name] = file_ref(path)
    return Record(
        kind="quantize",
        verdict=overall(checks),
        checks=tuple(checks),
        metrics={"files": jsonable(files), "library": library_version()},
        notices=tuple(_fallback_notices(files)),
        inputs={"gguf": file_ref(config.gguf)},
        outputs=outputs,
        config=config.model_dump(mode="json"),
        versions=versions("llama-cpp-python", "gguf"),
        run=watch.info(),
    )


class QuantizedFile(TypedDict):
    """One output, as the record's metrics show it."""

    type: str
    path: str
    bytes: int
    bits_per_weight: float
    types: dict[str, int]
    fallbacks: dict[str, str]
    tensors: dict[str, str]
    attention_output_error: dict[int, float]


def stem(gguf: Path) -> str:
    """File name without ``.gguf`` and without the suffix of its own type."""
    return re.sub(r"-(F16|BF16|F32)$", "", gguf.stem, flags=re.IGNORECASE)


def fallbacks(gguf: GGUFFile, recipe: str) -> dict[str, str]:
    """Tensors stored in another kind of type than the recipe's, since their width forbids it.

    K- and I-quants pack super-blocks of 256 columns; for other widths libllama falls
    back to a type with blocks of 32.
    """
    if not _RECIPE_OF_SUPER_BLOCKS.search(recipe):
        return {}
    return {
        name: tensor.type
        for name, tensor in gguf.tensors.items()
        if len(tensor.shape) > 1
        and tensor.shape[-1] % QUANTIZED_COLUMNS
        and tensor.type not in _PLAIN_TYPES
        and not _SUPER_BLOCK_TYPES.match(tensor.type)
    }


def _refuse_quantized(source: GGUFFile) -> None:
    quantized = {t.type for t in source.tensors.values()} - _PLAIN_TYPES
    if quantized:
        raise ModelError(
            f"already quantized ({', '.join(sorted(quantized))}); quantizing it again loses more "
            "than quantizing the original",
            where=str(source.path),
            remedy="Give the F16, BF16 or F32 export.",
        )


def _preflight(config: QuantizeConfig, count: int) -> None:
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ToolError(f"cannot write here: {error.strerror}", where=str(config.out)) from None
    need = config.gguf.stat().st_size * count
    free = shutil.disk_usage(config.out).free
    if free < need:
        raise ToolError(
            f"up to {need / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free",
            where=str(config.out),
        )


def _description(
    recipe: str, path: Path, gguf: GGUFFile, errors: dict[int, float]
) -> QuantizedFile:
    return {
        "type": recipe,
        "path": str(path),
        "bytes": path.stat().st_size,
        "bits_per_weight": gguf.bits_per_weight,
        "types": gguf.types,
        "fallbacks": fallbacks(gguf, recipe),
        "tensors": {name: tensor.type for name, tensor in gguf.tensors.items()},
        "attention_output_error": errors,
    }


def _attention_output_errors(source: GGUFFile, result: GGUFFile) -> dict[int, float]:
    """Relative Frobenius error of each layer's attention output weight."""
    errors: dict[int, float] = {}
    for name, tensor in source.tensors.items():
        match = _ATTENTION_OUTPUT.match(name)
        if match and name in result.tensors:
            before = tensor.values().astype(np.float64)
            after = result.tensors[name].values().astype(np.float64)
            errors[int(match[1])] = float(np.linalg.norm(after - before) / np.linalg.norm(before))
    return errors


def _checks(source: GGUFFile, result: GGUFFile, subject: str, progress: Progress) -> list[Check]:
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    wrong = sorted(
        name
        for name in shapes.keys() | result.tensors.keys()
        if name not in result.tensors or shapes.get(name) != result.tensors[name].shape
    )
    broken: list[str] = []
    with progress.task(f"reading back {subject}", total=len(result.tensors)) as task:
        for name, tensor in result.tensors.items():
            if not np.isfinite(tensor.values()).all():
                broken.append(name)
            task.advance(1, item=name)
    return [
        judge(
            "quantize.tensors",
            len(wrong),
            0,
            subject=subject,
            detail="Same tensors and shapes as the input."
            if not wrong
            else f"Missing, added or reshaped: {', '.join(wrong[:5])}.",
        ),
        judge(
            "quantize.finite",
            len(broken),
            0,
            subject=subject,
            detail="Every weight is finite when dequantized."
            if not broken
            else f"Non-finite weights in {', '.join(broken[:5])}.",
        ),
    ]


def _fallback_notices(files: dict[str, QuantizedFile]) -> list[str]:
    notices = []
    for name, entry in files.items():
        fell = entry["fallbacks"]
        if fell:
            kinds = ", ".join(sorted(set(fell.values())))
            notices.append(
                f"{name}: {len(fell)} of {len(entry['tensors'])} tensors fell back to {kinds}, "
                f"since their columns are no multiple of {QUANTIZED_COLUMNS}."
            )
    return notices
