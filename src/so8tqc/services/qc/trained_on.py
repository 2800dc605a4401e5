"""The base as it was in training, where that was a quantized one: its weights there and back.

An adapter trained on a 4-bit base (QLoRA) and merged into the full-precision base is another model
than was trained. What was trained is base and adapter with the quantized weights dequantized:
quantized again here as bitsandbytes does it while loading, or read from a checkpoint of
block-scaled FP8. Every matrix of a decoder layer is quantized, as those libraries do; head and
embedding are not.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from so8tqc.adapters.names import StoredNames, layer_of
from so8tqc.architectures import in_other_tower
from so8tqc.checkpoints.copy import companion_files
from so8tqc.checkpoints.patch import patch_files
from so8tqc.checkpoints.quantized import quantization_name
from so8tqc.checkpoints.safetensors_index import Checkpoint, TensorEntry, open_checkpoint
from so8tqc.errors import ConfigError, ModelError
from so8tqc.services.weights.quantizers import BLOCK, dequantized

if TYPE_CHECKING:
    import torch

_QUANTIZERS = {
    "nf4": "NF4, blocks of 64",
    "fp4": "FP4, blocks of 64",
    "int8": "8-bit, row by row",
}
_FP8 = "F8_E4M3"


@contextmanager
def base_of_training(base: Path, trained_on: str | None) -> Iterator[Path]:
    """The base that the adapter saw, as a directory that lasts as long as the ``with``.

    Args:
        base: the full-precision base.
        trained_on: ``nf4``, ``fp4``, ``int8``, or a directory of FP8 weights; None: the base.

    Raises:
        ConfigError: neither a method nor a directory.
        ModelError: a directory whose weights cannot be read as data, by the name of its method.
    """
    if trained_on is None:
        yield base
        return
    checkpoint = open_checkpoint(base)
    patches = _patches(checkpoint, trained_on)
    with TemporaryDirectory(prefix="so8tqc-trained-on-") as root:
        directory = Path(root)
        keep, _ = companion_files(checkpoint.directory, checkpoint.files)
        for file in keep:
            destination = directory / file.relative_to(base)
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, destination)
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
class _Scaled:
    """A stored FP8 matrix times its block scales, in float32; a ``checkpoints.patch.Patch``."""

    entry: TensorEntry
    scales: torch.Tensor
    dtype: str = "F32"

    def pieces(self, _stored: torch.Tensor) -> Iterator[torch.Tensor]:
        """A row of blocks at a time."""
        weight = _fp8(self.entry)
        rows, columns = weight.shape
        down = -(-rows // self.scales.shape[0])
        across = -(-columns // self.scales.shape[1])
        for i in range(self.scales.shape[0]):
            part = weight[i * down : (i + 1) * down].float()
            yield part * self.scales[i].repeat_interleave(across)[:columns]


def _patches(checkpoint: Checkpoint, trained_on: str) -> Mapping[str, _Quantized | _Scaled]:
    targets = {
        name: entry
        for name, entry in checkpoint.tensors.items()
        if len(entry.shape) == 2
        and layer_of(name) is not None
        and name.endswith(".weight")
        and not in_other_tower(name)
    }
    if trained_on in _QUANTIZERS:
        return {name: _Quantized(trained_on) for name in targets}
    directory = Path(trained_on)
    if not directory.is_dir():
        raise ConfigError(
            f"{trained_on!r} is neither a directory nor one of {', '.join(_QUANTIZERS)}",
            where="trained_on",
        )
    quantized = open_checkpoint(directory)
    name = quantization_name(quantized.config)
    names = StoredNames(quantized)
    found: dict[str, _Quantized | _Scaled] = {}
    for target, entry in targets.items():
        other = names.find(target)
        scale = names.find(f"{target}_scale_inv") or names.find(f"{target}_scale")
        if other is None or other.dtype != _FP8 or scale is None or other.shape != entry.shape:
            continue
        found[target] = _Scaled(other, _scales(scale))
    if not found:
        raise ModelError(
            f"its weights are {name or 'not quantized'}, which cannot be read as data here",
            where=trained_on,
            remedy="Readable are FP8 weights with scales. For bitsandbytes give the method, nf4, "
            "fp4 or int8: the base is then quantized again as it was while the training loaded it.",
        )
    return found


def _fp8(entry: TensorEntry) -> torch.Tensor:
    import torch

    raw = np.fromfile(entry.file, np.uint8, entry.end - entry.start, offset=entry.start)
    return torch.from_numpy(raw).view(torch.float8_e4m3fn).reshape(entry.shape)


def _scales(entry: TensorEntry) -> torch.Tensor:
    from so8tqc.checkpoints.safetensors_index import load_tensor

    scales = load_tensor(entry).float()
    return scales.reshape(-1, scales.shape[-1]) if scales.ndim else scales.reshape(1, 1)
