"""What the tensors of a GGUF must stand for: a model directory, folded or merged, as converted.

The converter is run on the base without writing a file, and says through which operations every
tensor goes (``llama.conversion_trace``); they are repeated on the base's weights, or on what
rotations or adapters make of them. So every architecture that the converter knows is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from so8tqc.adapters.changed import AdapterPatch, Changed
from so8tqc.adapters.plan import AdapterPlan
from so8tqc.architectures import gguf_layout
from so8tqc.checkpoints.baking import TensorFold
from so8tqc.checkpoints.patch import Patch, tensor_view
from so8tqc.checkpoints.plan import PlannedTensor
from so8tqc.checkpoints.safetensors_index import Checkpoint, TensorEntry, load_any
from so8tqc.errors import MissingToolError, ToolError
from so8tqc.gguf.conversion import Conversion, UntraceableError
from so8tqc.gguf.file import GGUFFile
from so8tqc.gguf.tensor_map import FloatArray, arrangements
from so8tqc.progress import SILENT
from so8tqc.rotations.rotation_set import RotationSet
from so8tqc.services.export.proof import tensors_by_name
from so8tqc.sources.converted.history import traced

if TYPE_CHECKING:
    import torch

KEEP = "keep"
"""The dtype that a bake stores by default: that of the base."""

MakePatch = Callable[[str], Patch]
"""safetensors dtype, or ``keep`` → what computes a tensor's new value."""


@dataclass(frozen=True)
class Expected:
    """The weights that a GGUF's tensors must stand for.

    Attributes:
        checkpoint: the base.
        patches: source tensor → what makes its new value, for those that a bake changes.
        conversion: the history of every tensor; None where no converter told it.
        untraced: why there is none.
        sources: GGUF tensor → the source tensors that go into it.
        architecture: ``general.architecture`` of the file.
    """

    checkpoint: Checkpoint
    patches: Mapping[str, MakePatch]
    conversion: Conversion | None
    untraced: str
    sources: Mapping[str, tuple[str, ...]]
    architecture: str
    _entries: Mapping[tuple[str, int], TensorEntry] = field(repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """GGUF tensors that the file must have."""
        return tuple(self.conversion.outputs if self.conversion else self.sources)

    def is_changed(self, name: str) -> bool:
        """Whether the bake changes anything that goes into a GGUF tensor."""
        return any(source in self.patches for source in self.sources.get(name, ()))

    def values(self, name: str, *, dtype: str = KEEP, baked: bool = True) -> FloatArray:
        """A GGUF tensor's values before rounding to its type, float32.

        Args:
            name: the GGUF tensor.
            dtype: safetensors dtype that a bake has stored changed tensors in.
            baked: False: what the base itself has.

        Raises:
            UntraceableError: they cannot be told.
        """
        if self.conversion is None:
            return self._by_layout(name, dtype, baked)

        def load(file: str, offset: int) -> torch.Tensor:
            entry = self._entries.get((Path(file).name, offset))
            if entry is None:
                raise UntraceableError(f"it was read from {Path(file).name}, which is unknown")
            return self._stored(entry, dtype, baked)

        result = self.conversion.replay(name, load)
        values: FloatArray = result.float().contiguous().numpy()
        return values

    def _stored(self, entry: TensorEntry, dtype: str, baked: bool) -> torch.Tensor:
        import torch

        make = self.patches.get(entry.name) if baked else None
        if make is None:
            return load_any(entry)
        return torch.cat(list(make(dtype).pieces(tensor_view(entry)))).reshape(entry.shape)

    def _by_layout(self, name: str, dtype: str, baked: bool) -> FloatArray:
        """By gguf-py's name map, for architectures whose layout is known exactly."""
        if name not in self.sources:
            raise UntraceableError(f"nothing is known of its source ({self.untraced})")
        if gguf_layout(self.architecture) is None:
            raise UntraceableError(
                f"how {self.architecture!r} is arranged is told by the converter alone "
                f"({self.untraced})"
            )
        config = self.checkpoint.config
        text = config.get("text_config")
        parts = []
        for source in self.sources[name]:
            entry = self.checkpoint.tensors[source]
            stored = self._stored(entry, dtype, baked).float().numpy()
            known = text if isinstance(text, dict) else config
            _, made = next(arrangements(stored, source, name, self.architecture, known))
            parts.append(made)
        return parts[0] if len(parts) == 1 else np.stack(parts)


class History(NamedTuple):
    """What the converter does to a model; None, and why nobody says."""

    conversion: Conversion | None
    untraced: str = ""


def expected_of(
    checkpoint: Checkpoint,
    gguf: GGUFFile,
    *,
    rotations: RotationSet | None = None,
    planned: Sequence[PlannedTensor] = (),
    plan: AdapterPlan | None = None,
    history: History | None = None,
) -> Expected:
    """What a file must stand for.

    Args:
        checkpoint: the base.
        gguf: the file.
        rotations, planned: of the reference, if it has gates alone.
        plan: of the reference, if it has adapters.
        history: of the base's conversion, where it was traced already.
    """
    conversion, reason = history or history_of(checkpoint)
    sources = conversion.sources if conversion else tensors_by_name(checkpoint, gguf)
    return Expected(
        checkpoint,
        patches_of(rotations, planned, plan),
        conversion,
        reason,
        sources,
        gguf.architecture,
        {(entry.file.name, entry.start): entry for entry in checkpoint.tensors.values()},
    )


def history_of(checkpoint: Checkpoint) -> History:
    """What the converter does to a model, if it says so."""
    try:
        return History(traced(checkpoint))
    except (MissingToolError, ToolError) as error:
        return History(None, error.what)


def patches_of(
    rotations: RotationSet | None, planned: Sequence[PlannedTensor], plan: AdapterPlan | None
) -> dict[str, MakePatch]:
    """Source tensor → what makes its new value, for those that a bake changes."""
    return dict(_patches(rotations, planned, plan))


def _patches(
    rotations: RotationSet | None, planned: Sequence[PlannedTensor], plan: AdapterPlan | None
) -> Iterator[tuple[str, MakePatch]]:
    if plan is not None:
        for changed in plan.changed:
            yield changed.entry.name, partial(_adapted, changed)
    elif rotations is not None:
        for one in planned:
            yield one.entry.name, partial(_folded, rotations, one)


def _adapted(changed: Changed, dtype: str) -> Patch:
    return AdapterPatch(changed if dtype == KEEP else replace(changed, dtype=dtype))


def _folded(rotations: RotationSet, planned: PlannedTensor, dtype: str) -> Patch:
    its = planned if dtype == KEEP else replace(planned, dtype=dtype)
    with SILENT.task("folding") as task:
        return TensorFold(its, lambda: rotations, task)
