"""Reading rotations from any source, whole and validated."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from so8tqc.errors import RotationError
from so8tqc.rotations.blocks import target_blocks
from so8tqc.rotations.coarse import coarse_notices
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.content import weight_keys
from so8tqc.rotations.files.native import is_native, read_native
from so8tqc.rotations.files.peft_config import adapter_kind
from so8tqc.rotations.files.peft_oft import is_adapter, read_oft
from so8tqc.rotations.files.raw import RawRotations
from so8tqc.rotations.files.trained import gate_keys, read_trained
from so8tqc.rotations.layers import parse_layers
from so8tqc.rotations.options import RotationOptions
from so8tqc.rotations.polar import nearest_rotations
from so8tqc.rotations.readings import require_reading
from so8tqc.rotations.rotation_set import (
    HEAD,
    FloatArray,
    RotationSet,
    Target,
    in_order,
    layers_of,
    orthogonality_error,
)

_Word = TypeVar("_Word", bound=StrEnum)
_NAMED = 10  # missing layers that a message lists


@dataclass(frozen=True)
class RotationSource:
    """A rotation file that was read, before any rotation is computed.

    Attributes:
        theta: target → [N, b, b] parameters of the layers that are wanted.
        parametrization, convention, site: as stated, declared or recognised.
        orthogonalize: whether the nearest rotations are wanted instead of the trained matrices.
        source: the file or directory.
        shared: each target has one block, repeated over all its features.
        metadata: what else the source declares.
        notices: what was recognised or overridden.
        dtype: torch's name of the dtype that theta is stored in, "" if nobody needs to know.
        strength: see ``RotationSet``.
    """

    theta: Mapping[Target, FloatArray]
    parametrization: Parametrization
    convention: Convention
    site: Site
    orthogonalize: bool
    source: str
    shared: bool
    metadata: Mapping[str, str]
    notices: tuple[str, ...]
    dtype: str = ""
    strength: Mapping[Target, float] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Target]:
        return in_order(self.theta)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have a rotation, ascending."""
        return layers_of(self.theta)

    def shape(self, target: Target) -> tuple[int, ...]:
        """(N, b, b) of a target's blocks."""
        return self.theta[target].shape

    def rotations(self) -> RotationSet:
        """Compute them.

        Raises:
            RotationError: a non-finite theta, a singular block that has no nearest rotation, or
                what a ``RotationSet`` refuses.
        """
        notices, theta, path = list(self.notices), dict(self.theta), Path(self.source)
        blocks = target_blocks(theta, self.parametrization, self.source)
        notices += coarse_notices(theta, blocks, self.parametrization, self.dtype)
        notices += reflection_notices(blocks)
        if self.orthogonalize:
            blocks = _orthogonalized(blocks, notices, path)
        return RotationSet(
            blocks=blocks,
            convention=self.convention,
            site=self.site,
            parametrization=self.parametrization,
            theta={} if self.parametrization is Parametrization.MATRIX else theta,
            source=self.source,
            shared=self.shared,
            metadata=self.metadata,
            notices=tuple(notices),
            strength=self.strength,
        )


def open_raw(path: Path, options: RotationOptions | None = None) -> RawRotations:
    """What a gate file, training checkpoint or PEFT OFT adapter holds and states, undecided.

    What ``options`` state is kept; where it differs from what the source says, a notice tells.

    Raises:
        RotationError: see the readers, and: a layer in ``options.layers`` without a gate; a theta
            that is not [N, b, b].
        ConfigError: a range in ``options.layers`` that runs backwards; a ``key`` that is none.
    """
    options = options or RotationOptions()
    raw = _read(path, options)
    notices = list(raw.notices)
    parametrization = _choose(options.parametrization, raw.parametrization, raw, notices)
    convention = _choose(options.convention, raw.convention, raw, notices)
    site = _choose(options.site, raw.site, raw, notices)
    theta = dict(raw.theta)
    for target, value in theta.items():
        _check_shape(value, f"{path}, {target}")
    if options.layers is not None:
        theta = _select(theta, options.layers, path)
    return dataclasses.replace(
        raw,
        theta=theta,
        parametrization=parametrization,
        convention=convention,
        site=site,
        notices=tuple(notices),
    )


def open_rotations(
    path: Path, options: RotationOptions | None = None, base: Path | None = None
) -> RotationSource:
    """Read a gate file, training checkpoint or PEFT OFT adapter directory.

    Args:
        path: the source.
        options: what is known of it.
        base: the model directory, for the message of a refusal.

    Raises:
        RotationError, ConfigError: as :func:`open_raw`; and a source that leaves its
            parametrization, convention or site open.
    """
    options = options or RotationOptions()
    return source_of(open_raw(path, options), path, options, base)


def source_of(
    raw: RawRotations, path: Path, options: RotationOptions, base: Path | None = None
) -> RotationSource:
    """The rotations of a raw source that leaves nothing open.

    Raises:
        ConfigError: it leaves its parametrization, convention or site open.
        RotationError: a site that does not fit what is there.
    """
    reading = require_reading(raw, path, base)
    return RotationSource(
        theta=raw.theta,
        parametrization=reading.parametrization,
        convention=reading.convention,
        site=reading.site,
        orthogonalize=options.orthogonalize == "polar",
        source=str(path),
        shared=raw.shared,
        metadata=raw.metadata,
        notices=raw.notices,
        dtype=raw.dtype,
        strength=raw.strength,
    )


def read_rotations(path: Path, options: RotationOptions | None = None) -> RotationSet:
    """Rotations of a gate file, training checkpoint or PEFT OFT adapter directory.

    What ``options`` state overrides what the source says, with a notice when they
    differ; what neither says is never assumed.

    Raises:
        RotationError, ConfigError: as :func:`open_rotations` and ``RotationSource.rotations``.
    """
    return open_rotations(path, options).rotations()


def _read(path: Path, options: RotationOptions) -> RawRotations:
    if is_adapter(path) and options.key is None and not _holds_gates(path):
        return read_oft(path)
    if not path.exists():
        raise RotationError("no such rotation file", where=str(path))
    if path.suffix == ".safetensors" and is_native(path):
        return read_native(path)
    return read_trained(path, options)


def _holds_gates(adapter: Path) -> bool:
    """Whether the modules of an adapter that is no OFT adapter have gates of their own."""
    return adapter_kind(adapter) != "OFT" and bool(gate_keys(weight_keys(adapter)))


def _choose(
    wanted: _Word | None, declared: _Word | None, raw: RawRotations, notices: list[str]
) -> _Word | None:
    if wanted is None or declared is None or wanted == declared:
        return wanted or declared
    fact = type(wanted).__name__.lower()
    says = f"by their names ({raw.recognised}) have" if raw.recognised else "declare"
    notices.append(f"The rotations {says} {fact} {declared}; {wanted} was asked for.")
    return wanted


def _select(theta: dict[Target, FloatArray], layers: str, path: Path) -> dict[Target, FloatArray]:
    wanted = parse_layers(layers)
    missing = _first_missing(wanted, {target.layer for target in theta})
    if missing:
        raise RotationError(
            f"no gate for layer(s) {missing}, which --layers names", where=str(path)
        )
    return {t: value for t, value in theta.items() if any(t.layer in r for r in wanted)}


def _first_missing(wanted: tuple[range, ...], present: Collection[int]) -> str:
    """Up to ``_NAMED`` layers that are wanted but absent; a range may be absurdly long."""
    absent = (layer for span in wanted for layer in span if layer not in present)
    few = list(dict.fromkeys(islice(absent, _NAMED + 1)))
    return ", ".join(map(str, sorted(few[:_NAMED]))) + (" …" if len(few) > _NAMED else "")


def _check_shape(theta: FloatArray, where: str) -> None:
    if theta.ndim != 3 or theta.shape[1] != theta.shape[2] or 0 in theta.shape:
        raise RotationError(f"theta has shape {list(theta.shape)}, expected [N, b, b]", where=where)


def reflection_notices(blocks: Mapping[Target, FloatArray]) -> list[str]:
    """What to say of a matrix in front of the output head that mirrors; [] if none does."""
    if HEAD not in blocks or not np.isfinite(blocks[HEAD]).all():
        return []
    if (np.linalg.det(blocks[HEAD]) >= 0).all():
        return []
    return [
        "The matrix in front of the output head has the determinant −1: it is a reflection, no "
        "rotation. It is folded as it is."
    ]


def _orthogonalized(
    blocks: dict[Target, FloatArray], notices: list[str], path: Path
) -> dict[Target, FloatArray]:
    """The rotation nearest to each block; a notice reports the drift before and after."""
    nearest: dict[Target, FloatArray] = {}
    for target, value in blocks.items():
        nearest[target], exists = nearest_rotations(value)
        if not exists.all():
            raise RotationError(
                f"block {int(np.argmin(exists))} is singular and has no nearest rotation",
                where=f"{path}, {target}",
            )
    before = max(float(orthogonality_error(b).max()) for b in blocks.values())
    after = max(float(orthogonality_error(b).max()) for b in nearest.values())
    moved = max(float(np.abs(nearest[t] - blocks[t]).max()) for t in blocks)
    notices.append(
        f"Blocks were replaced by the nearest rotation: drift ‖RᵀR − I‖ {before:.1e} before, "
        f"{after:.1e} after; largest change of an element {moved:.1e}."
    )
    return nearest
