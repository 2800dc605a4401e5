"""What a ``qc`` runs, by name: sources, and which of them are compared with which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from so8tqc.config import QCConfig
from so8tqc.disk.digests import short_name
from so8tqc.errors import InputError
from so8tqc.gguf.file import is_gguf
from so8tqc.llama.kv_types import DEFAULT_KV_TYPE
from so8tqc.rotations.rotation_set import RotationSet
from so8tqc.services.qc.readings import Reading
from so8tqc.sources.capture import Capture, is_capture
from so8tqc.sources.compare import Pair

REFERENCE, BASE, FLOOR, ARITHMETIC = "reference", "base", "noise floor", "arithmetic"

GATED = "gated"
"""Base plus gates, beside a recorded reference: noise floors are measured from it."""

_RESERVED = (REFERENCE, BASE, ARITHMETIC, GATED)


def floor_name(name: str) -> str:
    """Of the source that gives a quantized candidate's floor."""
    return f"quantization floor of {name}"


def fold_name(dtype: str) -> str:
    """Name of the source that gives a storage dtype's noise floor."""
    return f"{FLOOR} {dtype}"


@dataclass(frozen=True)
class Planned:
    """Everything that the sources of one pass are made of.

    Attributes:
        config: of the ``qc``.
        names: candidates, see :func:`names_of`.
        rotations: of the reference, if it is base plus gates.
        capture: the reference, if it was recorded.
        adapters: of the reference, in their order.
        dtypes: model directory among the candidates → dtype it stores the fold in.
        readings: GGUF candidate → how it is run.
        kv_types: candidate that is run with another cache → its type.
        floors: quantized candidates that have a floor.
    """

    config: QCConfig
    names: Mapping[str, Path]
    rotations: RotationSet | None
    capture: Capture | None
    adapters: Sequence[Path]
    dtypes: Mapping[str, str]
    readings: Mapping[str, Reading]
    kv_types: Mapping[str, str]
    floors: Sequence[str]

    @property
    def is_trained(self) -> bool:
        """Whether there are rotations or adapters, and so a base."""
        return self.rotations is not None or bool(self.adapters)

    @property
    def witness(self) -> str:
        """The source that noise floors are measured from."""
        return REFERENCE if self.capture is None else GATED

    def pairs(self) -> list[Pair]:
        """Which sources are compared with which."""
        pairs: list[Pair] = []
        if self.is_trained:
            pairs += [] if self.capture is None else [(REFERENCE, GATED)]
            pairs.append((BASE, REFERENCE))
            folds = (fold_name(dtype) for dtype in dict.fromkeys(self.dtypes.values()))
            pairs += [(self.witness, fold) for fold in (*folds, ARITHMETIC)]
        for name in self.names:
            reading = self.readings.get(name)
            if reading is not None and reading.by_weights not in (None, name):
                pairs += [(REFERENCE, reading.by_weights), (reading.by_weights, name)]
            if reading is not None and self.is_trained:
                pairs.append((BASE, name))
            pairs.append((REFERENCE, name))
            if name in self.floors:
                pairs.append((REFERENCE, floor_name(name)))
        return pairs


def base_of(config: QCConfig) -> Path:
    """What the rotations are applied to."""
    return config.base or config.reference


def with_kv_types(names: Mapping[str, Path], config: QCConfig) -> dict[str, Path]:
    """Candidates, and each GGUF among them once more with each other cache that is asked for."""
    caches = [kind for kind in dict.fromkeys(config.kv_types) if kind != DEFAULT_KV_TYPE]
    found = dict(names)
    for name, path in names.items():
        if is_gguf(path):
            found |= {f"{name} (kv {kind})": path for kind in caches}
    return found


def kv_types_of(config: QCConfig, names: Mapping[str, Path]) -> dict[str, str]:
    """Candidate of :func:`with_kv_types` that has another cache → its type."""
    return {
        name: kind
        for name in names
        for kind in config.kv_types
        if kind != DEFAULT_KV_TYPE and name.endswith(f" (kv {kind})")
    }


def names_of(candidates: Sequence[Path]) -> dict[str, Path]:
    """A short distinct name for each candidate."""
    names: dict[str, Path] = {}
    for path in candidates:
        name = short_name(path)
        taken = name in names or name in _RESERVED
        short = str(path) if taken else name
        if short in names:
            raise InputError("the same candidate is given twice", where=str(path))
        names[short] = path
    return names


def input_directory(config: QCConfig) -> Path:
    """The model directory whose tokenizer and processor make input of the texts."""
    return config.tokenizer or _tokenizer_directory(config)


def _tokenizer_directory(config: QCConfig) -> Path:
    for path in (base_of(config), *config.candidates):
        if not is_gguf(path) and not is_capture(path):
            return path
    raise InputError("these files give no tokenizer", remedy="Give --tokenizer MODEL_DIRECTORY.")
