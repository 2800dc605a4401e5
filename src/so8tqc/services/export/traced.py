"""A GGUF file against the replayed history of its conversion: every tensor, bit by bit."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from so8tqc.architectures import in_other_tower
from so8tqc.checkpoints.safetensors_index import Checkpoint, TensorEntry, load_any
from so8tqc.checkpoints.skeleton import skeleton
from so8tqc.gguf.conversion import Conversion, UntraceableError
from so8tqc.gguf.file import GGUFFile, GGUFTensor
from so8tqc.gguf.tensor_map import FloatArray, stored_as
from so8tqc.progress import SILENT, Progress
from so8tqc.services.export.comparison import TensorComparison

if TYPE_CHECKING:
    import torch

BUFFERS = (
    ".rotary_emb.inv_freq",
    ".attention.masked_bias",
    ".attention.bias",
    ".attn.masked_bias",
    ".attn.bias",
    ".rotary_pos_emb.inv_freq",
    ".num_batches_tracked",
    ".embeddings.position_ids",
)
"""What a model stores and computes again whenever it is loaded."""


class Replay:
    """A conversion, replayed from a checkpoint.

    Args:
        conversion: what the converter did.
        checkpoint: where its sources are read.
    """

    def __init__(self, conversion: Conversion, checkpoint: Checkpoint) -> None:
        self.conversion = conversion
        self._entries = {(e.file.name, e.start): e for e in checkpoint.tensors.values()}

    def _load(self, file: str, offset: int) -> torch.Tensor:
        entry = self._entries.get((Path(file).name, offset))
        if entry is None:
            raise UntraceableError(f"it was read from {Path(file).name}, where no tensor begins")
        return load_any(entry)

    def values(self, name: str) -> FloatArray:
        """A GGUF tensor's values before rounding, float32.

        Raises:
            UntraceableError: they cannot be told.
        """
        result = self.conversion.replay(name, self._load)
        values: FloatArray = result.float().contiguous().numpy()
        return values

    def explains(self, name: str, tensor: GGUFTensor) -> bool:
        """Whether the tensor holds these values, rounded to its type, and in their shape.

        Raises:
            UntraceableError: they cannot be told.
        """
        if tensor.type in ("I8", "I16", "I32", "I64", "F64"):
            result = self.conversion.replay(name, self._load).numpy()
            return bool(np.array_equal(result.reshape(-1), tensor.data.reshape(-1)))
        values = self.values(name)
        if _without_ones(values.shape) != _without_ones(tensor.shape):
            return False
        expected = stored_as(values.reshape(tensor.shape), tensor.type)
        return bool(np.array_equal(_bytes(expected), _bytes(tensor.data)))


def _bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _without_ones(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def compare_traced(
    checkpoint: Checkpoint, gguf: GGUFFile, conversion: Conversion, progress: Progress = SILENT
) -> TensorComparison:
    """Compare every tensor of the file with the replay of its history."""
    found = compare_stored(checkpoint, gguf, conversion, progress)
    _sort_unused(checkpoint, gguf, conversion, found)
    return found


def compare_stored(
    checkpoint: Checkpoint, gguf: GGUFFile, conversion: Conversion, progress: Progress = SILENT
) -> TensorComparison:
    """The same, of what the file holds: source tensors that went nowhere are not looked for."""
    replay = Replay(conversion, checkpoint)
    found = TensorComparison(gguf.architecture, traced=True)

    def compare(name: str) -> bool | str:
        try:
            return replay.explains(name, gguf.tensors[name])
        except UntraceableError as reason:
            return f"{name} ({reason})"
        finally:
            task.advance(1, item=name)

    names = [name for name in conversion.outputs if name in gguf.tensors]
    with (
        progress.task("comparing tensors", total=len(names), unit="tensors") as task,
        ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,
    ):
        results = dict(zip(names, pool.map(compare, names), strict=True))
    for name, result in results.items():
        sources = conversion.sources[name]
        if result is True:
            done = conversion.done(name) if sources else "made by the converter"
            found.equal |= dict.fromkeys(sources or (name,), done)
        elif result is False:
            found.different.append(name)
        else:
            found.untraced.append(str(result))
    found.missing += [name for name in conversion.outputs if name not in gguf.tensors]
    found.extra += [name for name in gguf.tensors if name not in conversion.outputs]
    return found


def _sort_unused(
    checkpoint: Checkpoint, gguf: GGUFFile, conversion: Conversion, found: TensorComparison
) -> None:
    """Source tensors that went nowhere, or not as a whole."""
    reached = elements_reached(gguf, conversion)
    looked_at = conversion.looked_at
    for name, entry in checkpoint.tensors.items():
        if name not in reached:
            if _is_copy(entry, checkpoint, reached) or name.endswith(BUFFERS):
                found.equal[name] = "left out: stored elsewhere, or computed"
            elif (
                name in looked_at
                or _beside_text(name, checkpoint)
                or in_other_tower(name)
                or _beyond_layers(name, checkpoint)
            ):
                found.unmapped.append(name)
            else:
                found.missing.append(name)
        elif prod(entry.shape) > reached[name]:
            found.missing.append(f"{name} (a part of it)")


def elements_reached(gguf: GGUFFile, conversion: Conversion) -> dict[str, int]:
    """Source tensor → elements of the file that it went into."""
    reached: dict[str, int] = {}
    for name, sources in conversion.sources.items():
        if name in gguf.tensors:
            for source in sources:
                reached[source] = reached.get(source, 0) + gguf.tensors[name].elements
    return reached


def _beside_text(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a tensor of a model that also sees or hears is no part of its text model."""
    built = skeleton(checkpoint) if isinstance(checkpoint.config.get("text_config"), dict) else None
    if built is None or not built.stack:
        return False
    parameter = built.name_in_model(name)
    around = built.stack.rpartition(".")[0] + "."
    return not parameter.startswith(around) and not parameter.startswith("lm_head")


def _beyond_layers(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a tensor belongs to layers that only predict further tokens, or to another tower."""
    from so8tqc.checkpoints.sites import layers_stored, text_layer_count

    count = text_layer_count(checkpoint)
    if count is None or layers_stored(checkpoint.tensors.keys()) <= count:
        return False
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    return bool(numbers) and numbers[0] >= count


def _is_copy(entry: TensorEntry, checkpoint: Checkpoint, reached: Mapping[str, int]) -> bool:
    """Whether another tensor, which went into the file, has the same bytes (a tied output head)."""
    from so8tqc.checkpoints.finite import compare

    return any(
        other.shape == entry.shape and other.dtype == entry.dtype and compare(other, entry).equal
        for name, other in checkpoint.tensors.items()
        if name in reached and other.shape == entry.shape and len(entry.shape) > 1
    )
