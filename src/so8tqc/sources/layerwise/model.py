"""Logit sources of models that are run a layer at a time.

Hidden states of all texts first (:meth:`StreamedModel.run`), then logits a block at a time, so that
sources are walked in step as those of resident models are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from so8tqc.checkpoints.plausible import require_plausible_config
from so8tqc.checkpoints.safetensors_index import Checkpoint, open_checkpoint
from so8tqc.errors import DataError, ModelError
from so8tqc.progress import SILENT, Progress
from so8tqc.sources import ranks
from so8tqc.sources.hf import OutputHead, head_blocks
from so8tqc.sources.layerwise.lanes import Lane
from so8tqc.sources.layerwise.shell import Shell
from so8tqc.sources.layerwise.walk import LayerPass, Passed
from so8tqc.sources.layerwise.weights import CheckpointWeights, Weights
from so8tqc.sources.own_forward import OwnForward
from so8tqc.sources.protocol import EncodedText, TokenIds
from so8tqc.sources.seen import images_of

if TYPE_CHECKING:
    import torch

STATES_BUDGET = 512 << 20
"""Bytes of hidden states that stay in memory between two layers; the others wait in a file."""


class StreamedModel:
    """A model whose layers are in memory one at a time.

    Args:
        checkpoint: the model directory.
        folder: where hidden states are kept meanwhile.
        weights: where tensors are read from; None: the directory's own files.
        dtype: compute dtype, None: float32.
        budget: bytes of hidden states that may stay in memory.

    Attributes:
        module: the transformers model; after :meth:`run` with what follows the layers.
        where: what its weights are read from.
        path, config, vocab_size, context: as of :class:`so8tqc.sources.hf.HFModel`.

    Raises:
        ModelError: it cannot be built.
        UnstreamableError: it has no layers that can be told apart.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        *,
        weights: Weights | None = None,
        dtype: str | None = None,
        budget: int = STATES_BUDGET,
    ) -> None:
        require_plausible_config(checkpoint)
        self._weights = weights or CheckpointWeights(checkpoint)
        self._shell = Shell(checkpoint, dtype or "float32")
        self.path = checkpoint.directory
        self.module: Any = self._shell.module
        self.config = self.module.config.get_text_config()
        self.vocab_size = int(self._shell.head.weight.shape[0])
        self.context = int(getattr(self.config, "max_position_embeddings", None) or 1 << 30)
        self.where = self._weights.where
        self._folder = folder
        self._budget = budget
        self._lanes: list[Lane] = []
        self._pass: LayerPass | None = None
        self._passed: Passed | None = None
        self._places: dict[bytes, int] = {}
        self._head: OutputHead | None = None

    @classmethod
    def open(cls, path: Path, folder: Path, *, dtype: str | None = None) -> StreamedModel:
        """A model directory.

        Raises:
            ModelError, UnstreamableError: as the class.
        """
        return cls(open_checkpoint(path), folder, dtype=dtype)

    @property
    def is_directory(self) -> bool:
        """Whether the weights are the model directory's own."""
        return isinstance(self._weights, CheckpointWeights)

    @property
    def bytes_read(self) -> int:
        """Bytes of stored tensors that were read so far."""
        return self._weights.bytes_read

    @property
    def begun(self) -> int:
        """The layer that the pass began at: not 0, if an earlier one was gone on with."""
        return 0 if self._passed is None else self._passed.begun

    def source(self, lane: Lane, name: str) -> StreamedSource:
        """A source that shares this model's layers; asked for before :meth:`run`."""
        self._lanes.append(lane)
        return StreamedSource(self, len(self._lanes) - 1, lane, name)

    def run(self, texts: Sequence[EncodedText], progress: Progress = SILENT) -> None:
        """Take all texts through all layers, in every lane.

        Raises:
            DataError: a text is longer than the model's context.
            UnstreamableError, ModelError, ToolError: as :meth:`LayerPass.run`.
        """
        mine = [text.tokens for text in texts]  # each process may be asked for any of them
        for tokens in mine:
            self._check_length(tokens)
        for tokens in mine:
            self._places.setdefault(tokens.tobytes(), len(self._places))
        unique = {tokens.tobytes(): tokens for tokens in mine}
        folder = self._folder / f"rank-{ranks.rank()}"
        self._pass = LayerPass(
            self._shell, self._weights, self._lanes, list(unique.values()), folder, self._budget
        )
        self._passed = self._pass.run(progress)
        forward = OwnForward.of_pass(
            self.module, self._shell.head, self._passed.seen, str(self.path)
        )
        self._head = OutputHead(self._shell.head, forward, str(self.path))

    def hidden(self, lane: int, tokens: TokenIds) -> torch.Tensor:
        """[T, D] a text's hidden states in a lane.

        Raises:
            DataError: the text was not among those of :meth:`run`.
        """
        place = self._places.get(tokens.tobytes())
        if self._passed is None or place is None:
            raise DataError("the text was not run through the layers", where=str(self.path))
        return self._passed.finals[lane][place]

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[t, D] hidden states → [t, V] logits, as :class:`so8tqc.sources.hf.OutputHead`."""
        if self._head is None:
            raise ModelError("its layers were not run", where=str(self.path))
        return self._head.logits(hidden)

    def close(self) -> None:
        """Drop what is in memory. What is on the disk stays, so that a killed run can go on."""
        self._passed = self._head = None

    def remove(self) -> None:
        """Delete what is on the disk."""
        if self._pass is not None:
            self._pass.remove()
        self._pass = None

    def _check_length(self, tokens: TokenIds) -> None:
        if images_of(tokens) is not None:
            raise DataError(
                "pictures are not run a layer at a time",
                where=str(self.path),
                remedy="Give --no-stream, or --images 0.",
            )
        if tokens.size > self.context:
            raise DataError(
                f"{tokens.size} tokens are more than the model's context of {self.context}",
                where=str(self.path),
            )


class StreamedSource:
    """One lane of a streamed model as a logit source.

    Args:
        model: the model, shared by its lanes.
        number: of the lane.
        lane: what it changes.
        name: label for reports.
    """

    def __init__(self, model: StreamedModel, number: int, lane: Lane, name: str) -> None:
        self.model = model
        self.name = name
        self.vocab_size = model.vocab_size
        self._number = number
        self._lane = lane

    def logits(self, tokens: TokenIds, rows: int, first: int = 0) -> Iterator[torch.Tensor]:
        """See :class:`so8tqc.sources.protocol.LogitSource`."""
        hidden = self.model.hidden(self._number, tokens)[first:]
        hidden = self._lane.before_head(self.model, hidden)
        for start in range(0, hidden.shape[0], rows):
            with self._lane.at_head(self.model):  # other sources share the head
                blocks = list(head_blocks(self.model, hidden[start : start + rows], rows))
            yield from blocks

    def close(self) -> None:
        """Release the model."""
        self.model.close()
