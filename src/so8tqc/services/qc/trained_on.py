"""The base as it was in training, where that was a quantized one: its weights there and back.

An adapter trained on a 4-bit base (QLoRA) and merged into the full-precision base is another model
than was trained. What was trained is base and adapter with the quantized weights dequantized:
quantized again here as bitsandbytes does it while loading (every matrix of a decoder layer; head
and embedding are not), or read from a quantized checkpoint (``checkpoints.packed``). Of that
*everything* is taken, since quantizers change more than the matrices: AWQ moves scales into norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from so8tqc.adapters.names import StoredNames, layer_of
from so8tqc.architectures import in_other_tower
from so8tqc.checkpoints.copy import copy_companions
from so8tqc.checkpoints.packed import READABLE, PackedMatrix, is_packed, values_of
from so8tqc.checkpoints.patch import patch_files
from so8tqc.checkpoints.quantized import quantization_name, quantization_settings
from so8tqc.checkpoints.safetensors_index import (
    ITEM_BYTES,
    Checkpoint,
    TensorEntry,
    load_any,
    load_tensor,
    open_checkpoint,
)
from so8tqc.errors import ConfigError, ModelError
from so8tqc.services.weights.quantizers import BLOCK, dequantized

if TYPE_CHECKING:
    import torch

_QUANTIZERS = {
    "nf4": "NF4, blocks of 64",
    "fp4": "FP4, blocks of 64",
    "int8": "8-bit, row by row",
}


@contextmanager
def base_of_training(base: Path, trained_on: str | None) -> Iterator[Path]:
    """The base that the adapter saw, as a directory that lasts as long as the ``with``.

    Args:
        base: the full-precision base.
        trained_on: ``nf4``, ``fp4``, ``int8``, or a directory of quantized weights; None: the base.

    Raises:
        ConfigError: neither a method nor a directory.
        ModelError: a directory whose weights cannot be read as data, by the name of its method, or
            that is no quantized form of the base.
    """
    if trained_on is None:
        yield base
        return
    checkpoint = open_checkpoint(base)
    patches = _patches(checkpoint, trained_on)
    with TemporaryDirectory(prefix="so8tqc-trained-on-") as root:
        directory = Path(root)
        copy_companions(checkpoint.directory, checkpoint.files, directory)
        patch_files([(f, directory / f.name) for f in checkpoint.files], patches)
        yield directory


@dataclass
class _Quantized:
    """A matrix quantized here and back, in float32; a ``checkpoints.patch.Patch``."""

    method: str
    dtype: str = "F32"

    def pieces(self, stored: torch.Tensor) -> Iterator[torch.Tensor]:
        """Whole rows, whole blocks."""
        columns = stored.shape[1]
        whole = BLOCK // np.gcd(BLOCK, columns)
        step = int(whole) * max(1, (1 << 18) // (int(whole) * columns))
        for start in range(0, stored.shape[0], step):
            rows = stored[start : start + step].float()
            values = dict(dequantized(rows)).get(_QUANTIZERS[self.method])
            if values is None:
                raise ModelError(f"{tuple(stored.shape)} is no whole number of blocks of {BLOCK}")
            yield values.contiguous()


@dataclass
class _Stored:
    """What a quantized checkpoint has in a tensor's place; a ``checkpoints.patch.Patch``."""

    dtype: str
    value: Callable[[], torch.Tensor]

    def pieces(self, _stored: torch.Tensor) -> Iterator[torch.Tensor]:
        """All of it."""
        yield self.value()


def _patches(checkpoint: Checkpoint, trained_on: str) -> Mapping[str, _Quantized | _Stored]:
    if trained_on in _QUANTIZERS:
        return {
            name: _Quantized(trained_on)
            for name, entry in checkpoint.tensors.items()
            if len(entry.shape) == 2
            and layer_of(name) is not None
            and name.endswith(".weight")
            and not in_other_tower(name)
        }
    directory = Path(trained_on)
    if not directory.is_dir():
        raise ConfigError(
            f"{trained_on!r} is neither a directory nor one of {', '.join(_QUANTIZERS)}",
            where="trained_on",
        )
    return _from_directory(checkpoint, open_checkpoint(directory))


def _from_directory(checkpoint: Checkpoint, quantized: Checkpoint) -> Mapping[str, _Stored]:
    """Every tensor of the base as the quantized checkpoint has it."""
    settings = quantization_settings(quantized.config) or {}
    where = str(quantized.directory)
    names = StoredNames(quantized)
    found: dict[str, _Stored] = {}
    packed, missing = 0, []
    for name, entry in checkpoint.tensors.items():
        other = names.find(name)
        if _is_packed(names, name, entry, settings):
            matrix = _matrix(names, name, entry, settings)
            found[name] = _Stored("F32", partial(values_of, matrix))
            packed += 1
        elif other is not None and other.dtype in ITEM_BYTES:
            if other.shape != entry.shape:
                raise ModelError(
                    f"{name} has shape {list(other.shape)}, the base's {list(entry.shape)}",
                    where=where,
                    remedy="Give the quantized form of the same base.",
                )
            found[name] = _Stored(other.dtype, partial(load_tensor, other))
        else:
            missing.append(name)
    said = quantization_name(quantized.config, quantized.tensors) or "not quantized"
    if not packed:
        raise ModelError(
            f"its weights are {said}, which cannot be read as data here",
            where=where,
            remedy=f"Readable are {READABLE}. For what bitsandbytes quantized while loading give "
            "the method: nf4, fp4 or int8.",
        )
    if missing:
        raise ModelError(
            f"its weights are {said}, but {len(missing)} tensors of the base cannot be read from "
            f"them, first {missing[0]}",
            where=where,
            remedy="Give the quantized form of the same base.",
        )
    return found


def _is_packed(
    names: StoredNames, name: str, entry: TensorEntry, settings: Mapping[str, Any]
) -> bool:
    """Whether a tensor of the base is a matrix that the quantized checkpoint has in parts."""
    module = name.removesuffix(".weight")
    matrix = len(entry.shape) == 2 and module != name
    return matrix and is_packed(settings, lambda part: names.find(f"{module}.{part}") is not None)


def _matrix(
    names: StoredNames, name: str, entry: TensorEntry, settings: Mapping[str, Any]
) -> PackedMatrix:
    """The parts of a quantized weight."""
    module = name.removesuffix(".weight")

    def find(part: str) -> torch.Tensor | None:
        other = names.find(f"{module}.{part}")
        return None if other is None else load_any(other)

    rows, columns = entry.shape
    return PackedMatrix(module, (rows, columns), settings, find)
