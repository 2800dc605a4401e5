"""What lies near a file: base models, and baked directories whose fingerprints a file states."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from so8tqc.checkpoints.provenance import PROVENANCE_NAME, Provenance, read_provenance
from so8tqc.errors import So8tqcError
from so8tqc.gguf.file import GGUFFile

_LOOKED_AT = 200
"""Folders looked into at most."""


def folders_near(path: Path) -> Iterator[Path]:
    """The folder of a file, what is in it and in the one above, two levels down."""
    here = path.absolute().parent
    return islice(_folders(here), _LOOKED_AT)


def _folders(here: Path) -> Iterator[Path]:
    for start in (here, here.parent):
        yield start
        for inner in _inside(start):
            yield inner
            yield from _inside(inner)


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        return []


def baked_as(gguf: GGUFFile, path: Path) -> tuple[Path, Provenance] | None:
    """The baked directory near a GGUF file that has the fingerprints which the file states."""
    rotations = gguf.fields.get("so8t.rotations.fingerprint")
    base = gguf.fields.get("so8t.base.fingerprint")
    if rotations is None:
        return None
    for folder in folders_near(path):
        if not (folder / PROVENANCE_NAME).is_file():
            continue
        try:
            said = read_provenance(folder)
        except So8tqcError:
            continue
        if said and (said.rotations_fingerprint, said.base_fingerprint) == (rotations, base):
            return folder, said
    return None


def base_for(path: Path, given: Path | None) -> Path | None:
    """The base that was given, else the only model directory near that was not baked."""
    if given is not None:
        return given
    found = {
        folder.resolve(): folder
        for folder in folders_near(path)
        if (folder / "config.json").is_file()
        and not (folder / PROVENANCE_NAME).is_file()
        and any(folder.glob("*.safetensors"))
    }
    return next(iter(found.values())) if len(found) == 1 else None
