"""``tokens.npz``: the token tables of a ``qc``, candidate by candidate."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from so8tqc.disk.atomic import atomic_file
from so8tqc.disk.foreign import require_plain_file
from so8tqc.errors import InputError
from so8tqc.metrics.columns import COLUMNS
from so8tqc.metrics.divergence import TokenTable

TOKENS_FILE = "tokens.npz"

_MAX_BYTES = 512 << 20
"""Size of the unpacked arrays at most: two and a half million tokens."""


def write_tokens(path: Path, tables: Mapping[str, TokenTable]) -> None:
    """One npz: ``NAME/COLUMN`` of every candidate; ``text``, ``position``, ``texts``, ``vocab``.

    Where texts have pictures it has ``image``, too; where experts are chosen, ``tie``.
    """
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for name, table in tables.items():
        arrays |= {"text": table.text, "position": table.position}
        if table.sees.any():
            arrays["image"] = np.asarray(table.image)
        if table.tie is not None:
            arrays["tie"] = table.tie
        arrays |= {"texts": np.array(table.texts), "vocab": np.array(table.vocab_size)}
        arrays |= {f"{name}/{column}": values for column, values in table.columns.items()}
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def _require_small(archive: zipfile.ZipFile) -> None:
    if sum(member.file_size for member in archive.infolist()) > _MAX_BYTES:
        raise ValueError(f"unpacks to more than {_MAX_BYTES >> 20} MiB")


def _require_rows(table: TokenTable) -> None:
    """See that every column has a number for every token, and every token a text."""
    indices = (table.text, table.position, *(() if table.image is None else (table.image,)))
    shapes = {values.shape for values in indices} | {c.shape for c in table.columns.values()}
    if table.tie is not None:
        shapes.add(table.tie.shape)
    if len(shapes) != 1 or len(shapes.pop()) != 1 or not table.text.size:
        raise ValueError("columns of different lengths")
    if any(values.dtype.kind != "i" for values in indices):
        raise ValueError("an index that is no integer")
    if table.tie is not None and table.tie.dtype != np.bool_:
        raise ValueError("a mark that is neither true nor false")
    if any(values.dtype != np.float64 for values in table.columns.values()):
        raise ValueError("a column of another type")
    if table.text.min() < 0 or table.text.max() >= len(table.texts) or table.vocab_size < 1:
        raise ValueError("a token of no text")


def read_tokens(path: Path) -> dict[str, TokenTable]:
    """Candidate → table, as :func:`write_tokens` wrote them.

    Raises:
        InputError: no such file, or not one of this version.
    """
    require_plain_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            _require_small(archive)
        with np.load(path, allow_pickle=False) as stored:
            names = dict.fromkeys(key.rpartition("/")[0] for key in stored if "/" in key)
            text, position, vocab = stored["text"], stored["position"], int(stored["vocab"])
            texts = tuple(map(str, stored["texts"]))
            image, tie = stored.get("image", None), stored.get("tie", None)
            tables = {
                name: TokenTable(
                    {column: stored[f"{name}/{column}"] for column in COLUMNS},
                    text,
                    position,
                    vocab,
                    texts,
                    image,
                    tie,
                )
                for name in names
            }
            for table in tables.values():
                _require_rows(table)
            return tables
    except Exception:  # noqa: BLE001  numpy, zipfile and zlib each fail in their own ways
        raise InputError("not a token table of this version", where=str(path)) from None
