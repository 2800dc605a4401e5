"""A quantized file beside the file it was made from: what it is, and the verdicts."""

from __future__ import annotations

import re
from typing import TypedDict

import numpy as np

from so8tqc.llama.gguf_file import QUANTIZED_COLUMNS, GGUFFile
from so8tqc.progress import SILENT, Progress
from so8tqc.records import Check, judge

PLAIN_TYPES = frozenset({"F64", "F32", "F16", "BF16"})
_SMALL_BLOCK = 32
_SUPER_BLOCK_TYPES = re.compile(r"^(I?Q\d.*_K|IQ(?!4_NL)\d.*|TQ.*|Q\d_K)$")
_RECIPE_OF_SUPER_BLOCKS = re.compile(r"_K|^IQ(?!4_NL)|^TQ")
_ATTENTION_OUTPUT = re.compile(r"^blk\.(\d+)\.attn_output\.weight$")


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


def describe(recipe: str, source: GGUFFile, result: GGUFFile) -> QuantizedFile:
    """Sizes, types and errors of a quantized file."""
    return {
        "type": recipe,
        "path": str(result.path),
        "bytes": result.path.stat().st_size,
        "bits_per_weight": result.bits_per_weight,
        "types": result.types,
        "fallbacks": fallbacks(result, recipe),
        "tensors": {name: tensor.type for name, tensor in result.tensors.items()},
        "attention_output_error": _attention_output_errors(source, result),
    }


def fallbacks(gguf: GGUFFile, recipe: str) -> dict[str, str]:
    """Tensors stored in another kind of type than the recipe's, since their width forbids it.

    K- and I-quants pack super-blocks of 256 columns; for other widths libllama falls back to a
    type with blocks of 32, and where those do not fit either, to F16.
    """
    if recipe in PLAIN_TYPES:
        return {}
    return {
        name: tensor.type
        for name, tensor in gguf.tensors.items()
        if len(tensor.shape) > 1 and _fell_back(tensor.shape[-1], tensor.type, recipe)
    }


def _fell_back(columns: int, stored: str, recipe: str) -> bool:
    if columns % _SMALL_BLOCK:
        return stored == "F16"
    return (
        columns % QUANTIZED_COLUMNS != 0
        and bool(_RECIPE_OF_SUPER_BLOCKS.search(recipe))
        and stored not in PLAIN_TYPES
        and not _SUPER_BLOCK_TYPES.match(stored)
    )


def fallback_notices(files: dict[str, QuantizedFile]) -> list[str]:
    """One sentence for each file in which tensors fell back."""
    notices = []
    for name, entry in files.items():
        if fell := entry["fallbacks"]:
            kinds = ", ".join(sorted(set(fell.values())))
            widths = (
                f"{_SMALL_BLOCK}"
                if set(fell.values()) == {"F16"}
                else f"{QUANTIZED_COLUMNS}" + (f" or {_SMALL_BLOCK}" if "F16" in kinds else "")
            )
            notices.append(
                f"{name}: {len(fell)} of {len(entry['tensors'])} tensors fell back to {kinds}, "
                f"since their columns are no multiple of {widths}."
            )
    return notices


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


def proof_checks(
    source: GGUFFile, result: GGUFFile, subject: str, progress: Progress = SILENT
) -> list[Check]:
    """Same tensors and shapes as the source, and finite when dequantized."""
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    wrong = sorted(
        name
        for name in shapes.keys() | result.tensors.keys()
        if name not in result.tensors or shapes.get(name) != result.tensors[name].shape
    )
    broken: list[str] = []
    with progress.task(
        f"reading back {subject}", total=len(result.tensors), unit="tensors"
    ) as task:
        for name, tensor in result.tensors.items():
            if not np.isfinite(tensor.values()).all():
                broken.append(name)
            task.advance(1, item=name)
    return [
        judge(
            "quantize.readable",
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
