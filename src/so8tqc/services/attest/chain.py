"""From a file back to what it was made from, by the records that lie beside what commands made.

Each command leaves a record: beside its one output (``NAME.record.json``), or in its directory
(``record.json``). A record names what went in. So the way back needs nothing but files, and ends
where a record, or what it names, is not here; where it ends is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from so8tqc.checkpoints.provenance import Provenance, read_provenance
from so8tqc.errors import InputError
from so8tqc.record_files import read_record, record_beside
from so8tqc.records import FileRef, Record

MAKERS = ("bake", "export", "quantize", "calibrate")
"""Kinds of records whose outputs are models."""

_SOURCE = {"export": "model", "quantize": "gguf", "calibrate": "gguf"}
"""Kind of record → its input that is followed."""

_FOLDERS_UP = 3
"""Folders above a record in which what it names is looked for, after everything has been moved."""

_LONGEST = 16
"""Steps that are followed; a record that names its own output would be followed for ever."""


@dataclass(frozen=True)
class Step:
    """What made a file or directory.

    Attributes:
        output: where it is.
        path: the record.
        record: what it says.
    """

    output: Path
    path: Path
    record: Record

    @property
    def kind(self) -> str:
        """Which command."""
        return self.record.kind


@dataclass(frozen=True)
class Chain:
    """The way back from a file.

    Attributes:
        steps: the newest first.
        baked: the model directory that was baked, and what it says; None if the way ends before.
        base, rotations, adapters: what went into the bake, where it is here.
        end: a sentence, where the way ends and why; "" if base and rotations are here.
    """

    steps: tuple[Step, ...]
    baked: tuple[Path, Provenance] | None
    base: Path | None
    rotations: Path | None
    adapters: tuple[Path, ...]
    end: str

    def step(self, kind: str) -> Step | None:
        """The step of this kind, None if the way has none."""
        return next((step for step in self.steps if step.kind == kind), None)


def follow(path: Path) -> Chain:
    """Follow the records of a file or model directory back as far as they go.

    Raises:
        ModelError: a ``so8tqc.json`` on the way is malformed.
    """
    steps: list[Step] = []
    current = path
    for _ in range(_LONGEST):
        step = made_by(current)
        if step is None:
            break
        steps.append(step)
        if step.kind == "bake":
            break
        name = _SOURCE[step.kind]
        source = located(Path(step.record.inputs[name].path), step.path)
        if source is None:
            gone = step.record.inputs[name].path
            return Chain(tuple(steps), None, None, None, (), _gone(gone, step.path))
        current = source
    provenance = read_provenance(current) if current.is_dir() else None
    if provenance is None:
        return Chain(tuple(steps), None, None, None, (), _unmade(current))
    return _to_the_base(tuple(steps), current, provenance)


def _to_the_base(steps: tuple[Step, ...], baked: Path, provenance: Provenance) -> Chain:
    """The last stretch: what a baked directory says of its base and rotations."""
    near = baked / "so8tqc.json"
    base = located(Path(provenance.base), near)
    adapters = tuple(located(Path(a.path), near) for a in provenance.adapters)
    gates = provenance.convention is not None
    rotations = located(Path(provenance.rotations), near) if gates else None
    missing = [] if base else [f"its base {provenance.base}"]
    missing += [f"its rotations {provenance.rotations}"] if gates and rotations is None else []
    missing += [
        f"its adapter {said.path}"
        for said, found in zip(provenance.adapters, adapters, strict=True)
        if found is None
    ]
    end = ""
    if missing:
        end = f"The way back ends at {baked.name}: {' and '.join(missing)} not here."
    found = tuple(path for path in adapters if path is not None)
    whole = len(found) == len(adapters)
    return Chain(steps, (baked, provenance), base, rotations, found if whole else (), end)


def made_by(path: Path) -> Step | None:
    """The record of the command that made a file or directory; None if none is beside it."""
    for candidate in _records_of(path):
        try:
            record = read_record(candidate)
        except InputError:  # of another tool, or of an older version
            continue
        if record.kind in MAKERS and any(_names(o, path) for o in record.outputs.values()):
            return Step(path, candidate, record)
    return None


def _records_of(path: Path) -> Iterator[Path]:
    """Where the record of an output may lie."""
    for candidate in (record_beside(path), path.parent / "record.json"):
        if candidate.is_file():
            yield candidate


def _names(output: FileRef, path: Path) -> bool:
    return Path(output.path).name == path.name


def located(path: Path, near: Path) -> Path | None:
    """Where something is that a record names, if it is here.

    Args:
        path: as the record has it: absolute, or relative to where the command was run.
        near: the record. What was moved together with it is found by the end of its path.
    """
    if path.is_absolute() and path.exists():
        return path
    folders = [near.absolute().parent, *list(near.absolute().parents)[1 : _FOLDERS_UP + 1]]
    for folder in folders:
        for start in range(len(path.parts)):
            end = Path(*path.parts[start:])
            if end.is_absolute() or ".." in end.parts:
                continue
            if (found := folder / end).exists():
                return found
    return path if path.exists() else None


def _gone(name: str, record: Path) -> str:
    return f"The way back ends at {record.name}: {name}, which it was made from, is not here."


def _unmade(path: Path) -> str:
    return f"The way back ends at {path.name}: no record beside it says what it was made from."
