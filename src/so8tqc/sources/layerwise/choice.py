"""Which models are run a layer at a time: those that are to be, and those that memory cannot hold.

A model that cannot be (its layers share weights, or its forward does between them what the doors
cannot hold) is run resident, and that is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from so8tqc.checkpoints.safetensors_index import Checkpoint, open_checkpoint
from so8tqc.errors import ConfigError, ModelError, So8tqcError
from so8tqc.progress import Progress
from so8tqc.rotations.rotation_set import RotationSet
from so8tqc.sources.folded import FoldedSource
from so8tqc.sources.gated import GatedSource
from so8tqc.sources.hf import HFModel, HFSource
from so8tqc.sources.layerwise.free import free_memory
from so8tqc.sources.layerwise.lanes import Folded, Gated, Plain
from so8tqc.sources.layerwise.model import StreamedModel
from so8tqc.sources.layerwise.shell import UnstreamableError
from so8tqc.sources.layerwise.weights import Weights
from so8tqc.sources.protocol import EncodedText, LogitSource

Model = HFModel | StreamedModel

_USED = 0.9
"""Share of the free memory that models may take: logits and texts need some, too."""

_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2}

_Built = TypeVar("_Built")


class _AgainError(Exception):
    """A model turned out not to be streamable."""


class ModelLoader:
    """Loads transformers models, resident or a layer at a time.

    Args:
        folder: where hidden states are kept meanwhile.
        stream: whether they are run a layer at a time; None: where memory does not suffice.
        directories: the model directories that will be in memory together.
        dtype, device_map: as :meth:`so8tqc.sources.hf.HFModel.load`.

    Attributes:
        notices: what is to be said of it.
        streams: whether models are run a layer at a time.

    Raises:
        ConfigError: both this and ``device_map`` are asked for.
    """

    def __init__(
        self,
        folder: Path,
        *,
        stream: bool | None,
        directories: Iterable[Path] = (),
        dtype: str | None = None,
        device_map: str | None = None,
    ) -> None:
        if stream and device_map:
            raise ConfigError(
                "a model is run a layer at a time, or spread over devices",
                where="stream, device_map",
            )
        self.notices: list[str] = []
        self._folder = folder
        self._dtype = dtype
        self._device_map = device_map
        self._resident: dict[Path, str] = {}
        self._streamed: list[StreamedModel] = []
        self.streams = bool(stream)
        if stream is None and device_map is None and not _on_gpu():
            self.streams = self._beyond_memory(directories)

    def load(self, path: Path) -> Model:
        """A model directory.

        Raises:
            ModelError: it cannot be used.
        """
        if self.streams and path not in self._resident:
            try:
                return self._add(StreamedModel.open(path, self._place(path), dtype=self._dtype))
            except UnstreamableError as reason:
                self._keep_resident(path, reason)
        return HFModel.load(path, dtype=self._dtype, device_map=self._device_map)

    def of_weights(self, path: Path, checkpoint: Checkpoint, weights: Weights) -> StreamedModel:
        """A file's weights, as a model of a directory's class.

        Args:
            path: the file, for messages.
            checkpoint: the directory.
            weights: under its names, in its layout.

        Raises:
            ModelError: transformers cannot build the model.
            UnstreamableError: the model cannot be run a layer at a time.
        """
        made = StreamedModel(checkpoint, self._place(path), weights=weights, dtype=self._dtype)
        return self._add(made)

    def built(
        self,
        build: Callable[[], _Built],
        sources: Callable[[_Built], Iterable[LogitSource]],
        texts: Sequence[EncodedText],
        progress: Progress,
    ) -> _Built:
        """Sources whose layers have run, where they are run a layer at a time.

        Args:
            build: makes the sources by :meth:`load` and the functions of this module; called again
                where a model turns out to be one that must be resident.
            sources: those in what ``build`` returns.
            texts: what they will be asked for.
            progress: told about layers.

        Raises:
            ModelError, ToolError: as :meth:`StreamedModel.run`.
        """
        while True:
            self._streamed.clear()
            made = build()
            try:
                for model in self._streamed:
                    self._run(model, texts, progress)
            except BaseException as error:
                for source in sources(made):
                    source.close()
                if isinstance(error, So8tqcError | _AgainError):
                    self.finished()
                if isinstance(error, _AgainError):
                    continue
                raise
            return made

    def finished(self) -> None:
        """Delete what was kept on the disk: what the models were run for is done."""
        for model in self._streamed:
            model.remove()

    def _run(self, model: StreamedModel, texts: Sequence[EncodedText], progress: Progress) -> None:
        try:
            model.run(texts, progress)
        except UnstreamableError as reason:
            if not model.is_directory:
                raise ModelError(
                    f"its weights cannot be run a layer at a time: {reason}",
                    where=model.where,
                    remedy="Use --gguf-reading libllama.",
                ) from None
            self._keep_resident(model.path, reason)
            raise _AgainError from None
        if model.begun:
            self.notices.append(
                f"{model.where} goes on at layer {model.begun}, where an earlier run stopped."
            )

    def _add(self, model: StreamedModel) -> StreamedModel:
        self._streamed.append(model)
        return model

    def _place(self, path: Path) -> Path:
        return self._folder / f"{len(self._streamed)}-{path.name}"

    def _keep_resident(self, path: Path, reason: UnstreamableError) -> None:
        self._resident[path] = str(reason)
        self.notices.append(f"{path} is not run a layer at a time, but held in memory: {reason}.")

    def _beyond_memory(self, directories: Iterable[Path]) -> bool:
        size = _BYTES[self._dtype or "float32"]
        need = sum(size * _weights(open_checkpoint(path)) for path in dict.fromkeys(directories))
        free = free_memory()
        if need <= _USED * free:
            return False
        self.notices.append(
            f"The models would take {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free: "
            "they are run a layer at a time."
        )
        return True


def plain_source(model: Model, name: str) -> LogitSource:
    """The model as it is."""
    if isinstance(model, StreamedModel):
        return model.source(Plain(), name)
    return HFSource(model, name)


def gated_source(model: Model, rotations: RotationSet, name: str) -> LogitSource:
    """The model with gates."""
    if isinstance(model, StreamedModel):
        return model.source(Gated(rotations), name)
    return GatedSource(model, rotations, name)


def folded_source(
    model: Model, rotations: RotationSet, name: str, storage: str | None
) -> LogitSource:
    """The model with our own exact fold, rounded to a storage dtype."""
    if isinstance(model, StreamedModel):
        return model.source(Folded(rotations, storage), name)
    return FoldedSource(model, rotations, name, storage)


def _weights(checkpoint: Checkpoint) -> int:
    return sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
