"""Sources that share a layer's weights: the model as it is, with gates, with the fold."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

from so8tqc.disk.digests import sha256_json
from so8tqc.rotations.enums import Site
from so8tqc.rotations.rotation_set import RotationSet, Target
from so8tqc.sources.folded import fold_targets
from so8tqc.sources.gated import HasModules, gated_states, gates_of, installed
from so8tqc.sources.placement import replaced

if TYPE_CHECKING:
    import torch


class Lane(Protocol):
    """What a source changes of a model.

    Attributes:
        key: tells it from other lanes, also those of another run.
    """

    key: str

    def at(self, model: HasModules, layer: int) -> AbstractContextManager[None]:
        """The change at a layer whose weights are there, for the duration of a ``with``."""

    def before_head(self, model: HasModules, hidden: torch.Tensor) -> torch.Tensor:
        """What the output head is given of [t, D] hidden states."""

    def at_head(self, model: HasModules) -> AbstractContextManager[None]:
        """The change of the output head, for the duration of a ``with``."""


class Plain:
    """The model as it is."""

    key = "plain"

    def at(self, model: HasModules, layer: int) -> AbstractContextManager[None]:  # noqa: ARG002
        """See :class:`Lane`."""
        return nullcontext()

    def before_head(self, model: HasModules, hidden: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """See :class:`Lane`."""
        return hidden

    def at_head(self, model: HasModules) -> AbstractContextManager[None]:  # noqa: ARG002
        """See :class:`Lane`."""
        return nullcontext()


class Gated(Plain):
    """The model with gates: as :class:`so8tqc.sources.gated.GatedSource`."""

    def __init__(self, rotations: RotationSet) -> None:
        self._rotations = rotations
        self.key = f"gated {_digest(rotations)}"

    def at(self, model: HasModules, layer: int) -> AbstractContextManager[None]:
        """See :class:`Lane`."""
        gates = gates_of(model, self._rotations, _targets(self._rotations, layer))
        return installed(gates, self._rotations.site)

    def before_head(self, model: HasModules, hidden: torch.Tensor) -> torch.Tensor:
        """See :class:`Lane`."""
        if self._rotations.site is not Site.HEAD:
            return hidden
        return gated_states(hidden, gates_of(model, self._rotations))


class Folded(Plain):
    """The model with our own fold: as :class:`so8tqc.sources.folded.FoldedSource`."""

    def __init__(self, rotations: RotationSet, storage: str | None) -> None:
        self._rotations = rotations
        self._storage = storage
        self.key = f"folded {storage} {_digest(rotations)}"

    def at(self, model: HasModules, layer: int) -> AbstractContextManager[None]:
        """See :class:`Lane`."""
        targets = _targets(self._rotations, layer)
        return replaced(list(fold_targets(model, self._rotations, targets, self._storage)))

    def at_head(self, model: HasModules) -> AbstractContextManager[None]:
        """See :class:`Lane`."""
        if self._rotations.site is not Site.HEAD:
            return nullcontext()
        rotations = self._rotations
        return replaced(list(fold_targets(model, rotations, rotations, self._storage)))


def _targets(rotations: RotationSet, layer: int) -> list[Target]:
    if rotations.site is Site.HEAD:
        return []
    return [target for target in rotations if target.layer == layer]


def _digest(rotations: RotationSet) -> str:
    """Of what the rotations compute, wherever they were read from."""
    blocks = {
        str(t): hashlib.sha256(rotations.column_blocks(t).tobytes()).hexdigest() for t in rotations
    }
    return sha256_json({"site": str(rotations.site), "blocks": blocks})
