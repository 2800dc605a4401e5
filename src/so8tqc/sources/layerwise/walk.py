"""The pass: layer by layer, every lane's texts through it, while the next is read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from so8tqc.disk.digests import sha256_json
from so8tqc.progress import SILENT, Progress
from so8tqc.records import versions
from so8tqc.sources.layerwise.doors import Doors, Walker, resumable
from so8tqc.sources.layerwise.lanes import Lane, Plain
from so8tqc.sources.layerwise.shell import (
    AROUND,
    EMBEDDING,
    HEAD,
    Group,
    Shell,
    wanted_tensors,
)
from so8tqc.sources.layerwise.states import Journal, States
from so8tqc.sources.layerwise.weights import Weights
from so8tqc.sources.own_forward import SeenPass, ordinary_ids
from so8tqc.sources.protocol import TokenIds

if TYPE_CHECKING:
    import torch


class Passed(NamedTuple):
    """What a pass has found.

    Attributes:
        finals: lane → of each text, [T, D] the backbone's output.
        seen: a few tokens' whole pass through the model as it is.
        begun: the layer it began at: not 0, if an earlier pass was gone on with.
    """

    finals: list[list[torch.Tensor]]
    seen: SeenPass
    begun: int


class LayerPass:
    """One pass of texts through a model, in several lanes.

    Args:
        shell: the model, without weights; afterwards what follows the layers is in it.
        weights: where they are read from.
        lanes: the sources that share them.
        texts: token ids of each text.
        folder: where hidden states are kept meanwhile; deleted by :meth:`remove`.
        budget: bytes of hidden states that may stay in memory.
    """

    def __init__(
        self,
        shell: Shell,
        weights: Weights,
        lanes: Sequence[Lane],
        texts: Sequence[TokenIds],
        folder: Path,
        budget: int,
    ) -> None:
        self._shell = shell
        self._weights = weights
        self._lanes = [*lanes, Plain()]
        self._texts = texts
        proof = np.array(ordinary_ids(shell.module.config), dtype=np.int64)
        self._doors = Doors(shell)
        of_lanes = [[Walker(self._doors, ids) for ids in texts] for _ in lanes]
        self._proof = Walker(self._doors, proof, proof=True)
        self._walkers = [*of_lanes, [self._proof]]
        self._states = States(folder, self._identity(proof), budget)
        self._reader = ThreadPoolExecutor(max_workers=1)

    def run(self, progress: Progress = SILENT) -> Passed:
        """Run it, or go on where an earlier one stopped.

        Raises:
            UnstreamableError: the model's code does between layers what the doors cannot hold.
            ModelError: a file was changed meanwhile, or a weight is missing.
            ToolError: the disk has no room for the states.
        """
        import torch

        total = len(self._shell.layers)
        with ExitStack() as stack:
            stack.callback(self._reader.shutdown, cancel_futures=True)
            task = stack.enter_context(progress.task("running layers", total=total, unit="layers"))
            stack.enter_context(torch.inference_mode())
            stack.enter_context(self._doors.installed())
            coming = self._ask(AROUND, EMBEDDING)
            self._put(coming, AROUND, EMBEDDING)
            begun = self._begin()
            task.advance(begun)
            coming = self._ask(begun)
            self._shell.unload(EMBEDDING)
            for layer in range(begun, total):
                self._put(coming, layer)
                coming = self._ask(layer + 1) if layer + 1 < total else self._ask(HEAD)
                self._through(layer)
                self._shell.unload(layer)
                if layer + 1 < total:
                    self._keep(layer + 1)
                task.advance(1, item=f"layer {layer}")
            self._put(coming, HEAD)
            self._proof.go()
        seen = self._proof.seen
        assert seen is not None
        return Passed([[_final(w) for w in lane] for lane in self._walkers[:-1]], seen, begun)

    def remove(self) -> None:
        """Delete what was kept of it on the disk."""
        self._states.remove()

    def _identity(self, proof: TokenIds) -> str:
        import torch

        return sha256_json(
            {
                "weights": self._weights.identity(),
                "lanes": [lane.key for lane in self._lanes],
                "texts": [_sha256(ids) for ids in (*self._texts, proof)],
                "dtype": self._shell.dtype,
                "threads": torch.get_num_threads(),
                "versions": versions("torch", "transformers", "so8tqc"),
            }
        )

    @property
    def _all(self) -> list[Walker]:
        return [walker for lane in self._walkers for walker in lane]

    def _ask(self, *groups: Group) -> Future[dict[str, Any]]:
        """Have the stored tensors of some groups read."""
        names = [n for group in groups for n in wanted_tensors(self._shell, self._weights, group)]
        return self._reader.submit(self._weights.read, names)

    def _put(self, coming: Future[dict[str, Any]], *groups: Group) -> None:
        """Put what was read into the model."""
        read = coming.result()
        for group in groups:
            mine = wanted_tensors(self._shell, self._weights, group)
            self._shell.load(group, {name: read.pop(name) for name in mine})

    def _begin(self) -> int:
        """Bring every text to the door that it waits at; the layer behind it."""
        found = self._states.resume()
        if found is not None:
            journal, states = found
            if self._bring(journal, states):
                return journal.layer
            self._walkers = [
                [Walker(self._doors, w.ids, proof=w is self._proof) for w in lane]
                for lane in self._walkers
            ]
            self._proof = self._walkers[-1][0]
        self._doors.structures.clear()
        for walker in self._all:
            walker.go()
        states_bytes = sum(w.hidden.numel() * w.hidden.element_size() for w in self._all)
        self._states.require_room(states_bytes)
        self._keep(0)
        return 0

    def _bring(self, journal: Journal, states: Iterable[torch.Tensor]) -> bool:
        """Go to a layer with known states; whether the model gives all else there as before."""
        with self._doors.skipping(journal.structures):
            for walker, state in zip(self._all, states, strict=True):
                walker.skip_to(journal.layer, state)
                walker.go()
        self._doors.structures |= journal.structures
        same = [w.digest() for w in self._all] == list(journal.given)
        return same and all(w.door == journal.layer for w in self._all)

    def _through(self, layer: int) -> None:
        """Every lane's texts through a layer whose weights are there."""
        number = 0
        for lane, walkers in zip(self._lanes, self._walkers, strict=True):
            with lane.at(self._shell, layer):
                for walker in walkers:
                    self._states.restore(number, walker.hidden)
                    walker.hidden = None
                    walker.go()
                    number += 1

    def _keep(self, layer: int) -> None:
        given = [walker.digest() for walker in self._all]
        whole = resumable(self._doors.structures, range(layer))
        known = [digest for digest in given if digest is not None]
        journal = None
        if whole and len(known) == len(given):
            journal = Journal(layer, known, self._doors.structures)
        self._states.keep(layer, [walker.hidden for walker in self._all], journal)


def _sha256(ids: TokenIds) -> str:
    return hashlib.sha256(ids.tobytes()).hexdigest()


def _final(walker: Walker) -> torch.Tensor:
    assert walker.final is not None
    return walker.final
