"""A GGUF file's weights, read a layer at a time."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from so8tqc.sources.gguf_weights import GGUFWeights
from so8tqc.sources.layerwise.weights import Watched

if TYPE_CHECKING:
    import torch


class GGUFFileWeights:
    """The tensors of a GGUF file by their values: dequantized, under a model directory's names."""

    def __init__(self, weights: GGUFWeights) -> None:
        self.weights = weights
        self.where = str(weights.file.path)
        self.names = weights.names
        self.files = weights.file.parts
        self._watched = Watched(self.files)

    @property
    def bytes_read(self) -> int:
        """See :class:`Weights`."""
        return self.weights.bytes_read

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """See :class:`Weights`."""
        self._watched.require_same()
        found = self.weights.read(names)
        self._watched.require_same()
        return found

    def identity(self) -> str:
        """See :class:`Weights`."""
        return self._watched.identity()
