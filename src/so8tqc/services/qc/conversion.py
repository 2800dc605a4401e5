"""Of a file that loses what its type cannot lose: the tensor or the key that is wrong."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from so8tqc.checkpoints.safetensors_index import Checkpoint
from so8tqc.gguf.conversion import Conversion
from so8tqc.gguf.file import GGUFFile, open_gguf
from so8tqc.services.export.proof import compare_tensors
from so8tqc.services.export.traced import compare_traced
from so8tqc.services.tensors.expected import history_of
from so8tqc.services.tensors.metadata import differences

PLAIN = frozenset({"F64", "F32", "F16", "BF16"})
"""Types that round a weight, and no more."""


def is_plain(path: Path) -> bool:
    """Whether every tensor of a GGUF has a type that only rounds."""
    return open_gguf(path).types.keys() <= PLAIN


def conversion_fault(path: Path, base: Checkpoint, baked: Collection[str]) -> str:
    """A sentence: which tensor or key is not what the converter makes of the base model.

    Args:
        path: the GGUF file.
        base: the model it was made from, but for the baked tensors.
        baked: source tensors that the bake has changed, which ``algebra.*`` judges.
    """
    gguf = open_gguf(path)
    conversion = history_of(base).conversion
    if conversion is None:
        found = compare_tensors(base, gguf)
        wrong = [name for name in found.different if name not in baked]
    else:
        of_bake = {n for n, sources in conversion.sources.items() if set(sources) & set(baked)}
        found = compare_traced(base, gguf, conversion)
        wrong = [name for name in found.different if name not in of_bake]
    wrong = _in_order(wrong, gguf) or [*found.missing, *found.extra]
    if wrong:
        others = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        return (
            "the first tensor that is not what the converter makes of its source is "
            f"{wrong[0]}{others}"
        )
    if keys := _wrong_keys(gguf, conversion):
        return f"every tensor is what the converter makes of its source, but a key is not: {keys}"
    return (
        "every tensor is what the converter makes of its source, so that its keys are wrong, or "
        "libllama runs this architecture otherwise than transformers"
    )


def _wrong_keys(gguf: GGUFFile, conversion: Conversion | None) -> str:
    """The first key that is another and reaches the logits, and how many more there are."""
    if conversion is None or conversion.keys is None:
        return ""
    found = [d for d in differences(gguf, conversion.keys) if d.reaches_logits]
    others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{found[0].sentence}{others}" if found else ""


def _in_order(names: list[str], gguf: GGUFFile) -> list[str]:
    order = {name: i for i, name in enumerate(gguf.tensors)}
    return sorted(names, key=lambda name: order.get(name, len(order)))
