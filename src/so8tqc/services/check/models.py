"""Model directories by themselves: whole, finite, with a tokenizer, and as their record says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from so8tqc.checkpoints.baking import hash_tensors
from so8tqc.checkpoints.finite import first_non_finite
from so8tqc.checkpoints.provenance import Provenance
from so8tqc.checkpoints.safetensors_index import Checkpoint
from so8tqc.progress import Progress
from so8tqc.records import Check, judge
from so8tqc.threads import WORKERS
from so8tqc.wording import listed

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def finite_check(checkpoint: Checkpoint) -> Check:
    """``file.finite``: tensors that hold a NaN or an infinity."""
    entries = list(checkpoint.tensors.values())
    with ThreadPoolExecutor(max_workers=WORKERS) as pool:
        places = dict(zip(checkpoint.tensors, pool.map(first_non_finite, entries), strict=True))
    broken = [f"{n}{list(place)}" for n, place in places.items() if place is not None]
    return judge(
        "file.finite",
        len(broken),
        0,
        detail=f"Tensors with NaN or infinity: {listed(broken)}."
        if broken
        else f"All {len(entries)} tensors are whole and finite.",
    )


def recorded_check(checkpoint: Checkpoint, provenance: Provenance, progress: Progress) -> Check:
    """``file.recorded``: baked tensors whose bytes are not those that the bake recorded."""
    there = [checkpoint.tensors.get(tensor.name) for tensor in provenance.tensors]
    found = hash_tensors([entry for entry in there if entry is not None], progress)
    other = [t.name for t in provenance.tensors if found.get(t.name) != t.sha256_after]
    return judge(
        "file.recorded",
        len(other),
        0,
        detail=f"Tensors that are not those which the bake wrote: {listed(other)}."
        if other
        else f"All {len(found)} baked tensors are those that the bake recorded in so8tqc.json.",
    )


def has_tokenizer(directory: Path) -> bool:
    """Whether a model directory brings a tokenizer."""
    return any((directory / name).is_file() for name in _TOKENIZERS)
