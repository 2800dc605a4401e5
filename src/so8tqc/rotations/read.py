"""Reading rotations from any source, whole and validated."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from so8tqc.errors import ConfigError, RotationError
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.native import read_native
from so8tqc.rotations.options import RotationOptions
from so8tqc.rotations.parametrization import rotation_blocks
from so8tqc.rotations.peft_oft import is_adapter, read_oft
from so8tqc.rotations.polar import nearest_rotations
from so8tqc.rotations.pt import TORCH_SUFFIXES, read_pt
from so8tqc.rotations.raw import RawRotations
from so8tqc.rotations.rotation_set import (
    FloatArray,
    RotationSet,
    Target,
    in_order,
    layers_of,
    orthogonality_error,
)

_NAMED = 10  # missing layers that a message lists
_Word = TypeVar("_Word", bound=StrEnum)


@dataclass(frozen=True)
class RotationSource:
    """A rotation file that was read, before any rotation is computed.

    Attributes:
        theta: target → [N, b, b] parameters of the layers that are wanted.
        parametrization, convention, site: as stated, declared or assumed.
        orthogonalize: whether the nearest rotations are wanted instead of the trained matrices.
        source: the file or directory.
        shared: each target has one block, repeated over all its features.
        metadata: what else the source declares.
        notices: what was assumed or overridden.
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
        blocks = _blocks(theta, self.parametrization, path)
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
        )


def open_rotations(path: Path, options: RotationOptions | None = None) -> RotationSource:
    """Read a gate file, training checkpoint or PEFT OFT adapter directory.

    Raises:
        RotationError: see the readers, and: a layer in ``options.layers`` without a gate; a theta
            that is not [N, b, b].
        ConfigError: a range in ``options.layers`` that runs backwards.
    """
    options = options or RotationOptions()
    raw = _read(path)
    notices = list(raw.notices)
    parametrization = _choose(
        "parametrization",
        options.parametrization,
        raw.parametrization,
        Parametrization.EXP,
        notices,
    )
    convention = _choose(
        "convention", options.convention, raw.convention, Convention.COLUMN, notices
    )
    site = _choose("site", options.site, raw.site, Site.INPUT, notices)
    theta = dict(raw.theta)
    for target, value in theta.items():
        _check_shape(value, f"{path}, {target}")
    if options.layers is not None:
        theta = _select(theta, options.layers, path)
    return RotationSource(
        theta=theta,
        parametrization=parametrization,
        convention=convention,
        site=site,
        orthogonalize=options.orthogonalize == "polar",
        source=str(path),
        shared=raw.shared,
        metadata=raw.metadata,
        notices=tuple(notices),
    )


def read_rotations(path: Path, options: RotationOptions | None = None) -> RotationSet:
    """Rotations of a gate file, training checkpoint or PEFT OFT adapter directory.

    What ``options`` state overrides what the source says, with a notice when they
    differ; what neither says is assumed (exp, column, input), with a notice.

    Raises:
        RotationError, ConfigError: as :func:`open_rotations` and ``RotationSource.rotations``.
    """
    return open_rotations(path, options).rotations()


def parse_layers(text: str) -> tuple[range, ...]:
    """``"0-3,7"`` → the ranges 0..3 and 7..7.

    Raises:
        ConfigError: a range that runs backwards.
    """
    ranges = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            raise ConfigError(
                f"{part} runs backwards", where="layers", remedy=f"Write {last}-{first}."
            )
        ranges.append(range(int(first), int(last or first) + 1))
    return tuple(ranges)


def _read(path: Path) -> RawRotations:
    if is_adapter(path):
        return read_oft(path)
    if path.is_dir():
        raise RotationError(
            "a directory without adapter_config.json is no PEFT adapter", where=str(path)
        )
    if not path.is_file():
        raise RotationError("no such rotation file", where=str(path))
    if path.suffix == ".safetensors":
        return read_native(path)
    if path.suffix in TORCH_SUFFIXES:
        return read_pt(path)
    raise RotationError(
        f"unknown kind of rotation file {path.suffix!r}",
        where=str(path),
        remedy="Give a .safetensors, .pt, .pth or .bin file, or a PEFT OFT adapter directory.",
    )


def _choose(
    name: str, wanted: _Word | None, declared: _Word | None, default: _Word, notices: list[str]
) -> _Word:
    if wanted is not None:
        if declared is not None and wanted != declared:
            notices.append(f"The rotations declare {name} {declared}; {wanted} was asked for.")
        return wanted
    if declared is not None:
        return declared
    notices.append(f"The rotations do not state their {name}; {default} was assumed.")
    return default


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


def _blocks(
    theta: dict[Target, FloatArray], parametrization: Parametrization, path: Path
) -> dict[Target, FloatArray]:
    """R of every target, in one batch where blocks do not depend on their neighbours."""
    for target, value in theta.items():
        _check_theta(value, f"{path}, {target}")
    blocks: dict[Target, FloatArray] = {}
    for group in _batches(theta, parametrization):
        together = rotation_blocks(np.concatenate([theta[t] for t in group]), parametrization)
        ends = np.cumsum([theta[t].shape[0] for t in group])
        blocks |= dict(zip(group, np.split(together, ends[:-1]), strict=True))
    for target, value in theta.items():
        _check_finite(blocks[target], value, f"{path}, {target}")
    return {target: blocks[target] for target in theta}


def _batches(
    theta: dict[Target, FloatArray], parametrization: Parametrization
) -> list[list[Target]]:
    """Targets whose blocks may be computed together: those of one size, but for legacy-taylor."""
    if parametrization is Parametrization.LEGACY_TAYLOR:
        return [[target] for target in theta]
    sizes: dict[int, list[Target]] = {}
    for target, value in theta.items():
        sizes.setdefault(value.shape[1], []).append(target)
    return list(sizes.values())


def _check_shape(theta: FloatArray, where: str) -> None:
    if theta.ndim != 3 or theta.shape[1] != theta.shape[2] or 0 in theta.shape:
        raise RotationError(f"theta has shape {list(theta.shape)}, expected [N, b, b]", where=where)


def _check_theta(theta: FloatArray, where: str) -> None:
    finite = np.isfinite(theta)
    if not finite.all():
        at = np.unravel_index(int(np.argmin(finite)), theta.shape)
        raise RotationError(
            f"theta of block {at[0]} has a non-finite value at [{at[1]}, {at[2]}]",
            where=where,
            remedy="Restore an earlier checkpoint; nothing can be baked from this one.",
        )


def _check_finite(blocks: FloatArray, theta: FloatArray, where: str) -> None:
    finite = np.isfinite(blocks).all(axis=(1, 2))
    if not finite.all():
        largest = float(np.abs(theta[np.argmin(finite)]).max())
        raise RotationError(
            f"R of block {int(np.argmin(finite))} is non-finite: theta reaches {largest:.1e}",
            where=where,
            remedy="Restore an earlier checkpoint; nothing can be baked from this one.",
        )


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
