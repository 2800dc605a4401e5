"""The file of second moments: what ``--solver hessian`` weighs errors with, and verifies by.

An uncompressed ``.npz``: ``manifest``, UTF-8 JSON as bytes (see :class:`Manifest`), and of each
group of tensors that share an input ``KEY/kept`` and ``KEY/held``, the upper triangles, row by row,
of Σ x xᵀ over the tokens that are fitted on and over those kept apart, in float32. What is solved
for is a function of these numbers, so that it does not matter on which machine they came about.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from so8tqc.errors import ModelError
from so8tqc.records import Frozen

Triangle = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]

_VERSION = 1
_MANIFEST = "manifest"
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile)
"""What numpy raises for an archive that is damaged, or lies about its sizes."""

_ALSO = "Compute it again (--hessians auto)."


class Group(Frozen):
    """Tensors that share an input.

    Attributes:
        key: of its triangles.
        tensors: GGUF names.
        columns: n.
        tokens, held: how many tokens were summed over.
        dead: columns that saw nothing but zeros.
    """

    key: str
    tensors: tuple[str, ...]
    columns: int
    tokens: int
    held: int
    dead: int


class Manifest(Frozen):
    """What the file says of itself.

    Attributes:
        version: of this format.
        inputs: name → SHA-256 of what the moments were computed from, and how.
        groups: in the order of the layers.
    """

    version: int = _VERSION
    inputs: dict[str, str | int]
    groups: tuple[Group, ...] = ()


class Part(NamedTuple):
    """A group with its triangles."""

    group: Group
    kept: Triangle
    held: Triangle


class SecondMoments(NamedTuple):
    """E[x xᵀ] of a group: over all tokens, over those fitted on, and over those kept apart.

    ``held`` is None where no tokens were kept apart.
    """

    whole: Matrix
    fitted: Matrix
    held: Matrix | None


def triangle(matrix: Matrix) -> Triangle:
    """[n, n] symmetric → [n (n + 1) / 2] float32."""
    found: Triangle = matrix[np.triu_indices(len(matrix))].astype(np.float32)
    return found


def square(packed: Triangle, n: int) -> Matrix:
    """The inverse of :func:`triangle`, in float64."""
    matrix = np.zeros((n, n))
    matrix[np.triu_indices(n)] = packed
    lower = np.tril_indices(n, -1)
    matrix[lower] = matrix.T[lower]
    return matrix


def write_moments(path: Path, manifest: Manifest, parts: Iterable[Part]) -> None:
    """Write the file (not atomic: give a temporary path). The same content gives the same bytes."""
    groups = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for part in parts:
            _write(archive, f"{part.group.key}/kept", part.kept)
            _write(archive, f"{part.group.key}/held", part.held)
            groups.append(part.group)
        said = manifest.model_copy(update={"groups": tuple(groups)})
        text = json.dumps(said.model_dump(mode="json"), sort_keys=True)
        _write(archive, _MANIFEST, np.frombuffer(text.encode(), np.uint8))


def _write(archive: zipfile.ZipFile, name: str, array: npt.NDArray[Any]) -> None:
    entry = zipfile.ZipInfo(f"{name}.npy")  # of 1980, whenever it is written
    with archive.open(entry, "w", force_zip64=True) as stream:
        np.lib.format.write_array(stream, array, allow_pickle=False)


class MomentsFile:
    """An open file of second moments.

    Args:
        path: the file.

    Raises:
        ModelError: missing, or no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise ModelError("no such file of second moments", where=str(path), remedy=_ALSO)
        try:
            _refuse_compressed(path)
            self._arrays: Mapping[str, npt.NDArray[Any]] = np.load(path, allow_pickle=False)
            text = bytes(np.ascontiguousarray(self._arrays[_MANIFEST])).decode()
            self.manifest = Manifest.model_validate_json(text)
        except (*_UNREADABLE, TypeError, ValidationError):
            raise ModelError(
                "not a file of second moments", where=str(path), remedy=_ALSO
            ) from None
        if self.manifest.version != _VERSION:
            raise ModelError(
                f"second moments of format {self.manifest.version}; this version reads {_VERSION}",
                where=str(path),
                remedy=_ALSO,
            )

    def part(self, group: Group) -> Part:
        """A group's triangles, as they are stored.

        Raises:
            ModelError: they are missing, damaged, not finite, or negative on the diagonal.
        """
        where = f"{self.path}, {group.tensors[0]}"
        size = group.columns * (group.columns + 1) // 2
        try:
            kept, held = (
                np.asarray(self._arrays[f"{group.key}/{kind}"]) for kind in ("kept", "held")
            )
        except _UNREADABLE:
            raise ModelError("its second moments cannot be read", where=where) from None
        for packed in (kept, held):
            if packed.shape != (size,) or packed.dtype != np.float32:
                raise ModelError(
                    f"second moments of {packed.size} numbers, where {group.columns} columns have "
                    f"{size}",
                    where=where,
                )
            if not np.isfinite(packed).all():
                raise ModelError("second moments are not finite", where=where)
            if packed[_diagonal(group.columns)].min() < 0:
                raise ModelError("a second moment of one column is negative", where=where)
        return Part(group, kept, held)

    def moments(self, group: Group) -> SecondMoments:
        """A group's second moments.

        Raises:
            ModelError: as :meth:`part`.
        """
        part = self.part(group)
        if group.tokens <= 0:
            raise ModelError(
                "no token was seen", where=f"{self.path}, {group.tensors[0]}", remedy=_ALSO
            )
        kept, held = square(part.kept, group.columns), square(part.held, group.columns)
        return SecondMoments(
            (kept + held) / (group.tokens + group.held),
            kept / group.tokens,
            held / group.held if group.held else None,
        )


def _refuse_compressed(path: Path) -> None:
    """What is stored as it is takes no more memory than the file takes disk.

    Raises:
        ValueError: an entry is compressed.
    """
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("an entry is compressed")


def _diagonal(n: int) -> npt.NDArray[np.intp]:
    """Where the diagonal lies in a packed triangle."""
    rows = np.arange(n)
    return rows * n - rows * (rows - 1) // 2
