"""``tokens.npz``: the token tables of a ``qc``, candidate by candidate."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from so8tqc.artifacts import atomic_file
from so8tqc.errors import InputError
from so8tqc.metrics.divergence import COLUMNS, TokenTable

TOKENS_FILE = "tokens.npz"


def write_tokens(path: Path, tables: Mapping[str, TokenTable]) -> None:
    """One npz: ``NAME/COLUMN`` of every candidate, ``text``, ``position``, ``texts``, ``vocab``."""
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for name, table in tables.items():
        arrays |= {"text": table.text, "position": table.position}
        arrays |= {"texts": np.array(table.texts), "vocab": np.array(table.vocab_size)}
        arrays |= {f"{name}/{column}": values for column, values in table.columns.items()}
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def read_tokens(path: Path) -> dict[str, TokenTable]:
    """Candidate → table, as :func:`write_tokens` wrote them.

    Raises:
        InputError: no such file, or not one of this version.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            names = dict.fromkeys(key.rpartition("/")[0] for key in stored if "/" in key)
            text, position, vocab = stored["text"], stored["position"], int(stored["vocab"])
            texts = tuple(map(str, stored["texts"]))
            return {
                name: TokenTable(
                    {column: stored[f"{name}/{column}"] for column in COLUMNS},
                    text, position, vocab, texts,
                )
                for name in names
            }  # fmt: skip
    except FileNotFoundError:
        raise InputError("no token table here", where=str(path)) from None
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile):
        raise InputError("not a token table of this version", where=str(path)) from None
