"""What a gate file may mean: every reading that the shapes allow, those alike run once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from so8tqc.checkpoints.plan import widened
from so8tqc.checkpoints.safetensors_index import Checkpoint, open_checkpoint
from so8tqc.checkpoints.sites import locate
from so8tqc.errors import RotationError
from so8tqc.rotations.files.raw import RawRotations
from so8tqc.rotations.options import RotationOptions
from so8tqc.rotations.readings import (
    FACTS,
    Reading,
    Widths,
    missing_facts,
    readings,
    rotation_set,
)
from so8tqc.rotations.rotation_set import RotationSet

SAME = 1e-6
"""Readings are one where no element of any R differs by more: a gate computes in float32 at best,
and R there has errors of that size."""


@dataclass(frozen=True)
class Candidate:
    """Rotations that the file may mean.

    Attributes:
        reading: how it is read.
        rotations: what comes of it, fitted to the base.
        same: further readings that give the same rotations.
    """

    reading: Reading
    rotations: RotationSet
    same: tuple[Reading, ...] = ()

    @property
    def name(self) -> str:
        """The reading in three words."""
        return str(self.reading)

    def means(self, reading: Reading | None) -> bool:
        """Whether a reading gives these rotations."""
        return reading is not None and reading in (self.reading, *self.same)


@dataclass(frozen=True)
class Candidates:
    """All that a gate file may mean on a base.

    Attributes:
        raw: the file, with the facts it states.
        stated: the reading that it states, or is recognised by; None where a fact is open.
        different: readings with different rotations.
        still: readings that turn nothing.
        impossible: reading → why there are no such rotations.
    """

    raw: RawRotations
    stated: Reading | None
    different: tuple[Candidate, ...]
    still: tuple[Reading, ...]
    impossible: Mapping[Reading, str]


def unsettled(raw: RawRotations, options: RotationOptions) -> RawRotations:
    """A source without the facts that it states itself: a file may be mistaken."""
    return replace(
        raw,
        parametrization=options.parametrization,
        convention=options.convention,
        site=options.site,
    )


def some_reading(raw: RawRotations, options: RotationOptions) -> RotationOptions:
    """Options that state a reading, whichever: what lies beside the gates depends on none.

    Raises:
        RotationError: there is none.
    """
    first = _stated(raw) or next(iter(readings(unsettled(raw, options))), None)
    if first is None:
        raise RotationError("these tensors have no reading")
    facts = {fact: getattr(first, fact) for fact in FACTS}
    return options.model_copy(update=facts)


def candidates(
    directory: Path, raw: RawRotations, rotations: Path, options: RotationOptions
) -> Candidates:
    """Every reading that the shapes allow, those alike merged.

    What the file states is no limit, only what ``options`` state is.

    Args:
        directory: the plain model that the gates were trained on.
        raw: what the file holds.
        rotations: the file.
        options: what is known of it.

    Raises:
        RotationError: no reading gives rotations that fit the base.
        ModelError: no checkpoint.
    """
    checkpoint = open_checkpoint(directory)
    free = unsettled(raw, options)
    stated = _stated(raw)
    possible = readings(free, _widths(raw, checkpoint))
    kept: list[Candidate] = []
    still: list[Reading] = []
    impossible: dict[Reading, str] = {}
    for reading in sorted(possible, key=lambda reading: reading != stated):  # the stated one first
        try:
            made = widened(rotation_set(free, reading, str(rotations)), checkpoint)
        except RotationError as error:
            impossible[reading] = error.what
            continue
        if not made.strength and _turn(made) <= SAME:
            still.append(reading)
        elif (at := _same(made, kept)) is None:
            kept.append(Candidate(reading, made))
        else:
            kept[at] = replace(kept[at], same=(*kept[at].same, reading))
    if not kept:
        raise _nothing(rotations, still, impossible)
    order = {reading: i for i, reading in enumerate(possible)}
    kept.sort(key=lambda candidate: order[candidate.reading])
    return Candidates(raw, stated, tuple(kept), tuple(still), impossible)


def _stated(raw: RawRotations) -> Reading | None:
    if missing_facts(raw):
        return None
    assert raw.parametrization and raw.convention and raw.site  # noqa: PT018  nothing is missing
    return Reading(raw.parametrization, raw.convention, raw.site)


def _widths(raw: RawRotations, checkpoint: Checkpoint) -> Widths:
    """(in, out) features of each target's projection, as the base stores it."""
    layered = [target for target in raw.theta if not target.is_head]
    widths = {}
    for site in locate(layered, checkpoint):
        shape = checkpoint.tensors[site.weight].shape
        if len(shape) == 2:
            out, into = reversed(shape) if site.transposed else shape
            widths[site.target] = (into, out)
    return widths


def _turn(rotations: RotationSet) -> float:
    """Largest element of R − I."""
    return max(
        float(np.abs(blocks - np.eye(blocks.shape[1])).max())
        for blocks in rotations.blocks.values()
    )


def _same(made: RotationSet, kept: Iterable[Candidate]) -> int | None:
    """Place of the candidate that computes the same."""
    for i, candidate in enumerate(kept):
        other = candidate.rotations
        if other.site is made.site and all(
            np.abs(other.column_blocks(target) - made.column_blocks(target)).max() <= SAME
            for target in made
        ):
            return i
    return None


def _nothing(
    rotations: Path, still: Iterable[Reading], impossible: Mapping[Reading, str]
) -> RotationError:
    if list(still):
        return RotationError(
            "the gates turn nothing, by whatever reading",
            where=str(rotations),
            remedy="Train them, or give the checkpoint of a later step.",
        )
    whys = "; ".join(f"{reading}: {why}" for reading, why in impossible.items())
    return RotationError(
        f"no reading gives rotations that fit the base{': ' if whys else ''}{whys}",
        where=str(rotations),
        remedy="The gates belong to another model, or --layers is needed.",
    )
