"""Readings: what a gate file's tensors may mean, where the file does not say.

A reading states the three facts that make rotations of parameters. Nothing here chooses one: a
file whose names leave several is refused with all of them, and ``so8tqc identify`` measures which
is the trained one.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from so8tqc.errors import ConfigError, RotationError
from so8tqc.rotations.enums import MEANINGS, Convention, Parametrization, Site
from so8tqc.rotations.files.raw import RawRotations
from so8tqc.rotations.rotation_set import (
    ORTHOGONALITY_LIMIT,
    FloatArray,
    RotationSet,
    Target,
    orthogonality_error,
)

Widths = Mapping[Target, tuple[int, int]]
"""Target → (in, out) features of its projection."""

_EACH = 4
"""Readings that a message lists one by one; of more, it explains the words they are made of."""

_LAYER_N = re.compile(r"layer_\d+")

FACTS = ("parametrization", "convention", "site")


@dataclass(frozen=True)
class Reading:
    """One way to read a gate file.

    Attributes:
        parametrization: how theta becomes R.
        convention: how the gate multiplies.
        site: where it sits.
    """

    parametrization: Parametrization
    convention: Convention
    site: Site

    def __str__(self) -> str:
        return f"{self.parametrization}, {self.convention}, {self.site}"

    @property
    def meaning(self) -> str:
        """The reading in one line."""
        words = (self.parametrization, self.convention, self.site)
        return "; ".join(MEANINGS[word] for word in words)

    @property
    def flags(self) -> tuple[str, ...]:
        """The options of a command that state it."""
        return tuple(part for fact in FACTS for part in (f"--{fact}", str(getattr(self, fact))))


def readings(raw: RawRotations, widths: Widths | None = None) -> tuple[Reading, ...]:
    """All readings that the source and its shapes allow, those it states or is recognised by kept.

    ``matrix`` is possible where every block is orthogonal, the Taylor series, the exponential and
    the Cayley transform where it is not the identity of A = θ − θᵀ = 0 that they would make of it.

    Args:
        raw: the source.
        widths: of the base's projections; None: sites are not judged by their width.
    """
    parametrizations = (
        (raw.parametrization,)
        if raw.parametrization
        else tuple(p for p in Parametrization if _possible(raw, p))
    )
    conventions = (raw.convention,) if raw.convention else tuple(Convention)
    sites = (raw.site,) if raw.site else tuple(s for s in Site if _fits(raw, s, widths))
    return tuple(Reading(*words) for words in product(parametrizations, conventions, sites))


def missing_facts(raw: RawRotations) -> tuple[str, ...]:
    """Which of the three facts neither the source nor the names of its tensors state."""
    return tuple(fact for fact in FACTS if getattr(raw, fact) is None)


def rotation_set(raw: RawRotations, reading: Reading, source: str) -> RotationSet:
    """The rotations of one reading.

    Args:
        raw: the source.
        reading: how it is read, whatever the source itself says.
        source: its name, for messages.

    Raises:
        RotationError: theta is not finite, or too large; or what a ``RotationSet`` refuses: a
            Taylor series of a large theta is no rotation, so not every reading makes one.
    """
    from so8tqc.rotations.blocks import target_blocks

    return RotationSet(
        blocks=target_blocks(dict(raw.theta), reading.parametrization, source),
        convention=reading.convention,
        site=reading.site,
        parametrization=reading.parametrization,
        theta={} if reading.parametrization is Parametrization.MATRIX else dict(raw.theta),
        source=source,
        shared=raw.shared,
        metadata=raw.metadata,
        notices=raw.notices,
        strength=raw.strength,
    )


def unstated(raw: RawRotations, source: Path, base: Path | None = None) -> ConfigError:
    """The refusal of a source that leaves facts open: its readings, and what to do.

    Args:
        raw: the source; at least one fact is missing.
        source: its path.
        base: the model directory, where it is known.
    """
    missing = missing_facts(raw)
    known = [f"{fact} {getattr(raw, fact)}" for fact in FACTS if fact not in missing]
    possible = readings(raw)
    by = f", recognised by the names {raw.recognised}" if raw.recognised else ""
    lines = [f"Known: {', '.join(known)}{by}."] if known else []
    lines.append(f"{len(possible)} readings are possible:")
    if len(possible) <= _EACH:
        lines += [f"  {reading}: {reading.meaning}" for reading in possible]
    else:
        for fact in missing:
            words = dict.fromkeys(getattr(reading, fact) for reading in possible)
            lines += [f"  --{fact} {word}: {MEANINGS[word]}" for word in words]
    lines += known_names(raw)
    command = shlex.join(["so8tqc", "identify", str(base) if base else "BASE", str(source)])
    lines.append(
        f"State {', '.join(f'--{fact}' for fact in missing)}, or measure which reading is the "
        f"trained one: {command}"
    )
    return ConfigError(
        f"the file does not state its {', '.join(missing)}, and nothing is assumed",
        where=str(source),
        remedy="\n".join(lines),
    )


def known_names(raw: RawRotations) -> list[str]:
    """What is known of files whose tensors have such names, in words."""
    if raw.recognised or not raw.keys:
        return []
    if all(key.endswith("rotation_gate.theta") for key in raw.keys.values()):
        return [
            "Names that end in rotation_gate.theta are known from a training code that made R by "
            "legacy-taylor, and have two readings there:",
            "  what the training's forward computes: x_row·R, --convention row (--site input or "
            "output, as the training put its gates)",
            "  what its bake script wrote: W·R, --convention column --site input",
        ]
    if all(_LAYER_N.fullmatch(key.split(".")[-1]) for key in raw.keys.values()):
        return [
            "Names layer_N are known from a training code that turns the returned hidden states "
            "with its gates: the logits do not depend on them, and of such a file there is "
            "nothing to bake. State the facts only of gates that stand on the way to the logits."
        ]
    return []


def _possible(raw: RawRotations, parametrization: Parametrization) -> bool:
    if parametrization is Parametrization.MATRIX:
        return all(_orthogonal(theta) for theta in raw.theta.values())
    return all(_turns(theta) for theta in raw.theta.values()) or not any(
        _orthogonal(theta) for theta in raw.theta.values()
    )


def _orthogonal(theta: FloatArray) -> bool:
    with np.errstate(all="ignore"):
        return bool((orthogonality_error(theta) <= ORTHOGONALITY_LIMIT).all())


def _turns(theta: FloatArray) -> bool:
    """Whether θ − θᵀ is not zero."""
    return bool((theta != theta.transpose(0, 2, 1)).any())


def _fits(raw: RawRotations, site: Site, widths: Widths | None) -> bool:
    head = {target for target in raw.theta if target.is_head}
    if (site is Site.HEAD) != bool(head):
        return False
    if widths is None or raw.shared:
        return True
    index = 0 if site.is_before else 1
    return all(
        target not in widths or theta.shape[0] * theta.shape[1] == widths[target][index]
        for target, theta in raw.theta.items()
    )


def require_reading(raw: RawRotations, source: Path, base: Path | None = None) -> Reading:
    """The reading that a source states or is recognised by.

    Raises:
        ConfigError: a fact is missing, see :func:`unstated`.
        RotationError: facts that contradict the tensors.
    """
    if raw.parametrization is None or raw.convention is None or raw.site is None:
        raise unstated(raw, source, base)
    head = any(target.is_head for target in raw.theta)
    if head != (raw.site is Site.HEAD):
        raise RotationError(
            f"site {raw.site} does not fit: "
            + ("the rotation belongs to no layer" if head else "the gates belong to layers"),
            where=str(source),
            remedy="A rotation in front of the output head has --site head, gates of layers have "
            "input or output.",
        )
    return Reading(raw.parametrization, raw.convention, raw.site)
