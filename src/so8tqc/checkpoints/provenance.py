"""``so8tqc.json``: what was baked into a model directory, from what, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from so8tqc.disk.atomic import write_text
from so8tqc.disk.digests import sha256_json
from so8tqc.disk.foreign import read_whole
from so8tqc.errors import ModelError
from so8tqc.records import FileRef, Frozen
from so8tqc.rotations.enums import Convention, Parametrization, Site

PROVENANCE_NAME = "so8tqc.json"


class BakedTensor(Frozen):
    """One tensor that the bake changed: SHA-256 of its bytes before and after.

    ``layer`` is None for a tensor that belongs to none: embedding, head, final norm.
    """

    name: str
    layer: int | None
    dtype: str
    sha256_before: str
    sha256_after: str


class BakedAdapter(Frozen):
    """An adapter that the bake applied: where it was, its method, its fingerprint."""

    path: str
    kind: str
    sha256: str


class Provenance(Frozen):
    """What a baked directory says about itself.

    ``adapters`` are in the order in which they were applied; convention, parametrization and site
    are those of the gates, None without any (``rotations`` is then the first adapter). With
    adapters ``rotations_fingerprint`` is over all of them and the gates, whose own is
    ``gates_fingerprint``.

    ``base_fingerprint`` is the SHA-256 over the base's config and all its tensors; None where the
    bake did not read them all, because it was not to be verified. ``recognised`` is by which names
    of tensors parametrization, convention or site were recognised, None where all were stated.
    """

    schema_version: Literal[1] = 1
    base: str
    base_fingerprint: str | None
    rotations: str
    rotations_fingerprint: str
    gates_fingerprint: str | None = None
    convention: Convention | None
    parametrization: Parametrization | None
    site: Site | None
    adapters: tuple[BakedAdapter, ...] = ()
    recognised: str | None = None
    tensors: tuple[BakedTensor, ...]
    versions: dict[str, str]


def baked_ref(directory: Path, provenance: Provenance, size: int) -> FileRef:
    """A baked directory as a record names it: by the digests of the tensors that were changed.

    Args:
        directory: where it is.
        provenance: what it says about itself.
        size: bytes of its weights.
    """
    tensors = [tensor.model_dump(mode="json") for tensor in provenance.tensors]
    return FileRef(path=str(directory), sha256=sha256_json(tensors), bytes=size)


def read_provenance(directory: Path) -> Provenance | None:
    """The provenance of a model directory, None if it was never baked.

    Raises:
        ModelError: the file is there but malformed.
    """
    path = directory / PROVENANCE_NAME
    if not path.is_file():
        return None
    content = read_whole(path, ModelError)
    try:
        return Provenance.model_validate_json(content)
    except ValidationError as error:
        raise ModelError(
            f"malformed provenance: {error.errors()[0]['msg']}", where=str(path)
        ) from None


def write_provenance(directory: Path, provenance: Provenance) -> None:
    """Write it, atomically."""
    write_text(directory / PROVENANCE_NAME, provenance.model_dump_json(indent=2) + "\n")
