"""A GGUF file with some tensors in other bytes: the KL that these cost, of the weights alone."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.errors import ModelError
from so8tqc.gguf.file import GGUFFile, GGUFTensor
from so8tqc.progress import SILENT, Progress
from so8tqc.sources.compare import compare
from so8tqc.sources.converted.history import traced
from so8tqc.sources.gguf_weights import GGUFWeights, require_architecture
from so8tqc.sources.layerwise.choice import ModelLoader, plain_source
from so8tqc.sources.layerwise.gguf import GGUFFileWeights
from so8tqc.sources.layerwise.shell import UnstreamableError
from so8tqc.sources.protocol import EncodedText, LogitSource

_ITSELF = "itself"


class Variants:
    """A file that is run by transformers in float32, a layer at a time, with tensors replaced.

    Args:
        file: what is compared with.
        directory: the model directory that it was exported from.
        texts: that KL is measured on.

    Raises:
        MissingToolError: there is no converter (``so8tqc vendor``).
        ModelError: the file is of another architecture.
    """

    def __init__(self, file: GGUFFile, directory: Path, texts: Sequence[EncodedText]) -> None:
        self._file = file
        self._checkpoint = open_checkpoint(directory)
        self._conversion = traced(self._checkpoint)
        self._texts = texts
        require_architecture(file, self._conversion, directory)

    def kl(
        self, variants: Mapping[str, Mapping[str, GGUFTensor]], progress: Progress = SILENT
    ) -> dict[str, float]:
        """Mean KL per token, nats, from the file to each variant.

        Args:
            variants: name → the tensors that it has in place of the file's.
            progress: told about layers and texts.

        Raises:
            ModelError: a weight cannot be put back, or the model not be run a layer at a time.
        """
        replaced = {_ITSELF: {}, **variants}
        with tempfile.TemporaryDirectory(prefix="so8tqc-") as folder:
            loader = ModelLoader(Path(folder), stream=True)

            def build() -> list[LogitSource]:
                return [self._source(loader, name, own) for name, own in replaced.items()]

            sources = loader.built(build, lambda made: made, self._texts, progress)
            pairs = [(_ITSELF, name) for name in variants]
            tables = compare(sources, pairs, self._texts, progress, "comparing types")
            for source in sources:
                source.close()
            loader.finished()
        return {
            name: float(np.mean(tables[(_ITSELF, name)].columns["kl"], dtype=np.float64))
            for name in variants
        }

    def _source(
        self, loader: ModelLoader, name: str, replaced: Mapping[str, GGUFTensor]
    ) -> LogitSource:
        file = replace(self._file, tensors={**self._file.tensors, **replaced})
        weights = GGUFFileWeights(GGUFWeights(file, self._checkpoint, self._conversion))
        try:
            return plain_source(loader.of_weights(Path(name), self._checkpoint, weights), name)
        except UnstreamableError as reason:
            raise ModelError(
                f"it cannot be run a layer at a time: {reason}",
                where=str(self._checkpoint.directory),
            ) from None
