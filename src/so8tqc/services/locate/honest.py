"""A reference's weights, baked and rounded to exactly the types that a candidate stores.

Rounded plainly: by torch to a directory's dtypes, by ggml's own encoders to the types of a GGUF.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np

from so8tqc.architectures import in_other_tower
from so8tqc.checkpoints.patch import tensor_view
from so8tqc.checkpoints.safetensors_index import Checkpoint, TensorEntry, any_dtype, load_any
from so8tqc.errors import ModelError
from so8tqc.gguf.conversion import UntraceableError
from so8tqc.gguf.file import GGUFFile
from so8tqc.gguf.tensor_map import stored_as
from so8tqc.llama.ggml import dequantizer, encode
from so8tqc.services.tensors.expected import Expected, MakePatch
from so8tqc.sources.gguf_weights import GGUFWeights
from so8tqc.sources.layerwise.weights import CheckpointWeights, Weights

if TYPE_CHECKING:
    import torch

_PLAIN = ("F32", "F16", "BF16")
BIAS = ".bias"


def zeros(entry: TensorEntry) -> torch.Tensor:
    """What stands for a bias that a candidate lacks."""
    import torch

    return torch.zeros(entry.shape)


class Completed:
    """Weights of a file, and biases that it lacks.

    Args:
        weights: of the file.
        reference: which biases there are.
        make: what stands for one that is not there.

    Attributes:
        lost: those biases.
    """

    def __init__(
        self,
        weights: Weights,
        reference: Checkpoint,
        make: Callable[[TensorEntry], torch.Tensor],
    ) -> None:
        self._weights = weights
        self._make = make
        self._reference = reference
        self.where = weights.where
        self.files = weights.files
        self.lost = tuple(
            name
            for name in reference.tensors
            if name.endswith(BIAS) and name not in weights.names and not in_other_tower(name)
        )
        self.names = weights.names | set(self.lost)

    @property
    def bytes_read(self) -> int:
        """See :class:`Weights`."""
        return self._weights.bytes_read

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """See :class:`Weights`."""
        lost = [name for name in names if name in self.lost]
        found = self._weights.read([name for name in names if name not in self.lost])
        return found | {name: self._make(self._reference.tensors[name]) for name in lost}

    def identity(self) -> str:
        """See :class:`Weights`."""
        return self._weights.identity()


class HonestDirectory(CheckpointWeights):
    """A reference's weights, baked, in the dtypes that a candidate's directory stores."""

    def __init__(
        self, checkpoint: Checkpoint, patches: Mapping[str, MakePatch], candidate: Checkpoint
    ) -> None:
        super().__init__(checkpoint)
        self._patches = patches
        self._candidate = candidate

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """See :class:`Weights`."""
        return {name: self._rounded(name) for name in names}

    def _rounded(self, name: str) -> torch.Tensor:
        import torch

        entry = self.checkpoint.tensors[name]
        stored = self._candidate.tensors.get(name, entry).dtype
        if (make := self._patches.get(name)) is not None:
            pieces = make(stored).pieces(tensor_view(entry))
            return torch.cat(list(pieces)).reshape(entry.shape)
        value = load_any(entry)
        return value.to(any_dtype(stored)) if value.is_floating_point() else value


class HonestFile(GGUFWeights):
    """What plain encoders store of a reference's weights in exactly the types of a file."""

    def __init__(self, file: GGUFFile, expected: Expected) -> None:
        assert expected.conversion is not None
        super().__init__(file, expected.checkpoint, expected.conversion)
        self._expected = expected

    def values(self, name: str) -> torch.Tensor:
        """See :class:`GGUFWeights`: rounded as the file's type of this tensor rounds."""
        import torch

        tensor = self.file.tensors[name]
        try:
            exact = self._expected.values(name)
        except UntraceableError as reason:
            raise ModelError(
                f"what {name} must stand for cannot be told: {reason}", where=str(self.file.path)
            ) from None
        if exact.size != tensor.elements:
            raise ModelError(
                f"{name} has {tensor.elements} elements, the reference's {exact.size}",
                where=str(self.file.path),
                remedy="Give the model that the file was made from.",
            )
        matrix = np.ascontiguousarray(exact.reshape(-1, exact.shape[-1]), dtype=np.float32)
        out = np.empty(matrix.size, np.float32)
        if tensor.type in _PLAIN:
            packed = np.ascontiguousarray(stored_as(matrix, tensor.type)).view(np.uint8)
        else:
            packed = encode(matrix, tensor.type)
        dequantizer(tensor.type)(packed.reshape(-1), out)
        return torch.from_numpy(out).reshape(tensor.shape)
