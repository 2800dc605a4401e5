"""Every tensor of a GGUF file against its source tensor, and the verdicts that follow."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from so8tqc.architectures import gguf_layout, in_other_tower
from so8tqc.checkpoints.safetensors_index import Checkpoint, load_tensor
from so8tqc.gguf.file import GGUFFile
from so8tqc.gguf.tensor_map import (
    GENERATED,
    FloatArray,
    arrangements,
    expert_index,
    gguf_names,
    stored_as,
)
from so8tqc.progress import SILENT, Progress
from so8tqc.records import Check, judge, skipped
from so8tqc.services.export.comparison import TensorComparison

_BLOCK = re.compile(r"^blk\.(\d+)\.")


class Explained(NamedTuple):
    """What the converter made of a source tensor.

    Attributes:
        done: how its values were rearranged (``unchanged``, …).
        values: the rearranged values, unrounded.
    """

    done: str
    values: FloatArray


def compare_tensors(
    checkpoint: Checkpoint, gguf: GGUFFile, progress: Progress = SILENT
) -> TensorComparison:
    """Compare every source tensor, renamed, rearranged and rounded, with the stored bytes."""
    names = _names_in_gguf(checkpoint, gguf)
    parts = Counter(names.values())
    found = TensorComparison(gguf.architecture)
    with (
        progress.task("comparing tensors", total=len(names), unit="tensors") as task,
        ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,
    ):

        def compare(source: str, name: str) -> str | None:
            explained = explain(checkpoint, source, gguf, name, parts[name])
            task.advance(1, item=source)
            return explained and explained.done

        results = {
            source: pool.submit(compare, source, name)
            for source, name in names.items()
            if name in gguf.tensors
        }
        for source, name in names.items():
            if source in results:
                done = results[source].result()
                if done is None:
                    found.different.append(source)
                else:
                    found.equal[source] = done
            elif name is None:
                found.unmapped.append(source)
            elif not _is_tied_head(name, gguf):
                found.missing.append(source)
    for name in gguf.tensors:
        if name not in parts and name not in GENERATED:
            perhaps = _perhaps_from(name, found.unmapped)
            (found.unattributed if perhaps else found.extra).append(name)
    return found


def tensors_by_name(checkpoint: Checkpoint, gguf: GGUFFile) -> dict[str, tuple[str, ...]]:
    """GGUF tensor → its source tensors: one, or the experts of a layer in order."""
    sources: dict[str, list[str]] = {}
    for source, name in _names_in_gguf(checkpoint, gguf).items():
        if name in gguf.tensors:
            sources.setdefault(name, []).append(source)
    return {
        name: tuple(sorted(s, key=lambda x: expert_index(x) or 0)) for name, s in sources.items()
    }


def explain(
    checkpoint: Checkpoint, source: str, gguf: GGUFFile, name: str, parts: int
) -> Explained | None:
    """What the converter did to a tensor, None if nothing it may do explains the bytes.

    Args:
        checkpoint: where the source tensor is.
        source: its name.
        gguf: the file.
        name: the GGUF tensor's name.
        parts: how many source tensors share the GGUF tensor (the experts of a layer).
    """
    config = _text_config(checkpoint.config)
    tensor = gguf.tensors[name]
    values = load_tensor(checkpoint.tensors[source]).float().numpy()
    index = expert_index(source) or 0
    if values.size * parts != tensor.elements or index >= parts:
        return None
    stored = tensor.data.reshape(parts, -1)[index]
    shape = tensor.shape if parts == 1 else tensor.shape[1:]
    for done, candidate in arrangements(values, source, name, gguf.architecture, config):
        if candidate.squeeze().shape != tuple(n for n in shape if n != 1):
            continue
        expected = stored_as(candidate.reshape(shape), tensor.type)
        if np.array_equal(expected.reshape(-1), stored, equal_nan=False):
            return Explained(done, candidate)
    return None


def _names_in_gguf(checkpoint: Checkpoint, gguf: GGUFFile) -> dict[str, str | None]:
    config = _text_config(checkpoint.config)
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 0)
    return gguf_names(checkpoint.tensors.keys(), gguf.architecture, layers)


def _perhaps_from(name: str, unmapped: Sequence[str]) -> bool:
    """Whether an unmapped tensor of the text tower belongs to the GGUF tensor's layer.

    A converter may fuse or split tensors in ways that the name map does not tell.
    """
    block = _BLOCK.match(name)
    if block is None:
        return False
    layer = f".{block[1]}."
    return any(layer in source and not in_other_tower(source) for source in unmapped)


def proof_checks(found: TensorComparison) -> list[Check]:
    """Verdicts on a comparison; what could not be compared is a skip that names it."""
    total = len(found.equal) + len(found.different)
    checks = [
        judge(
            "export.tensors",
            len(found.different),
            0,
            detail=f"{len(found.equal)} of {total} tensors equal their source, rounded to "
            f"the stored type; different: {_names(found.different)}",
        ),
        judge(
            "export.missing",
            len(found.missing),
            0,
            detail="Source tensors that the file lacks: " + _names(found.missing),
        ),
        judge(
            "export.extra",
            len(found.extra),
            0,
            detail="Tensors that come from no source tensor: " + _names(found.extra),
        ),
    ]
    if found.untraced:
        checks.append(
            skipped(
                "export.traced",
                f"The history of {len(found.untraced)} tensors cannot be replayed, so they were "
                f"not compared: {_names(found.untraced)}",
            )
        )
    if found.unmapped and found.traced:
        detail = (
            f"{len(found.unmapped)} source tensors are not in the file as tensors: they belong to "
            "other towers or to layers that predict further tokens, or became keys: "
            f"{_names(found.unmapped)}"
        )
        checks.append(skipped("export.unmapped", detail))
    elif found.unmapped:
        detail = (
            f"{len(found.unmapped)} source tensors have names that gguf-py's map does not "
            f"know, so they were not compared: {_names(found.unmapped)}"
        )
        if found.unattributed:
            detail += (
                f" {len(found.unattributed)} tensors of the file may come from them: "
                f"{_names(found.unattributed)}"
            )
        checks.append(skipped("export.unmapped", detail))
    if not found.traced and gguf_layout(found.architecture) is None:
        done = ", ".join(f"{count} {what}" for what, count in found.arrangements.items())
        checks.append(
            skipped(
                "export.layout",
                f"Which arrangement of rows {found.architecture!r} needs is not known here, so "
                f"any that explains the bytes was accepted ({done}); qc runs the file.",
            )
        )
    return checks


def _is_tied_head(name: str, gguf: GGUFFile) -> bool:
    """A tied output head is left out; llama.cpp then uses the token embedding."""
    return name == "output.weight" and "output.weight" not in gguf.tensors


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _names(names: Sequence[str]) -> str:
    return (", ".join(names[:5]) + (" …" if len(names) > 5 else "") or "none") + "."
