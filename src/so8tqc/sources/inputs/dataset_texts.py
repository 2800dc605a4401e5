"""Texts of a data set that the package ``datasets`` loads, by name on a hub or by folder.

``datasets:org/name``, ``datasets:org/name@revision`` or ``datasets:FOLDER``, then what is not
default: ``datasets:org/name?config=en&split=test&column=text&rows=200``. The rows become a JSONL
file in the user's cache, so that they are read and fingerprinted as any other file.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from so8tqc.disk.atomic import atomic_file
from so8tqc.disk.digests import sha256_json
from so8tqc.errors import DataError, MissingToolError, ToolError, first_line
from so8tqc.resources import user_cache
from so8tqc.sources.quiet import quiet_transformers

PREFIX = "datasets:"
_INSTALL = "Run: pip install -c constraints.txt 'so8tqc[datasets]'"
_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
"""The form of a data set's name on a hub; nothing else is ever asked of a hub."""

_OPTIONS = ("config", "split", "column", "rows")
_KEPT = ("id", "prompt", "language", "category", "description")
"""Columns that mean the same in a JSONL file."""


class DatasetSpec(NamedTuple):
    """Which columns and rows of which data set are taken; ``rows`` None: all of them."""

    name: str
    revision: str | None
    config: str | None
    split: str
    column: str
    rows: int | None


def parse_dataset(spec: str) -> DatasetSpec:
    """Read ``datasets:NAME[@REVISION][?config=…&split=…&column=…&rows=…]``.

    Raises:
        DataError: no name, an unknown option, or a number of rows that is none.
    """
    text, _, query = spec.removeprefix(PREFIX).partition("?")
    name, _, revision = text.partition("@")
    pairs = parse_qsl(query, keep_blank_values=True)
    options = dict(pairs)
    remedy = f"Write {PREFIX}org/name?split=test&column=text&rows=200."
    if not name or (query and not pairs):
        raise DataError("no data set is named", where=spec, remedy=remedy)
    if unknown := sorted(options.keys() - set(_OPTIONS)):
        raise DataError(
            f"no option {', '.join(unknown)}; there are {', '.join(_OPTIONS)}",
            where=spec,
            remedy=remedy,
        )
    rows = options.get("rows")
    if rows is not None and not re.fullmatch(r"[1-9]\d*", rows):
        raise DataError(f"rows={rows} is no number of rows", where=spec, remedy=remedy)
    return DatasetSpec(
        name=name,
        revision=revision or None,
        config=options.get("config"),
        split=options.get("split", "test"),
        column=options.get("column", "text"),
        rows=None if rows is None else int(rows),
    )


def dataset_file(spec: str) -> Path:
    """The JSONL file of a data set's texts, made anew from what ``datasets`` loads.

    Raises:
        DataError: the spec, the data set or the column is unusable, or there is no text.
        MissingToolError: ``datasets`` is not installed.
        ToolError: the hub cannot be reached.
    """
    wanted = parse_dataset(spec)
    lines = [
        json.dumps(_fields(row, wanted, spec), ensure_ascii=False)
        for row in itertools.islice(_rows(wanted, spec), wanted.rows)
        if str(row.get(wanted.column) or "").strip()
    ]
    if not lines:
        raise DataError("there is no text in the data set", where=spec)
    text = "\n".join(lines) + "\n"
    stem = re.sub(r"[^\w.-]+", "-", wanted.name).strip("-")
    path = user_cache() / "datasets" / f"{stem}-{sha256_json([wanted, text])[:12]}.jsonl"
    if not path.is_file():
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return path


def _rows(wanted: DatasetSpec, spec: str) -> Iterator[Mapping[str, Any]]:
    """Rows of the data set; nothing of it is run (no loading script)."""
    try:
        import datasets
    except ImportError:
        raise MissingToolError(
            "the package datasets is not installed", where=spec, remedy=_INSTALL
        ) from None
    if not Path(wanted.name).exists() and not _NAME.match(wanted.name):
        raise DataError("no such folder, and no name of a data set", where=spec)
    datasets.disable_progress_bars()
    try:
        with quiet_transformers():
            loaded = datasets.load_dataset(
                wanted.name, wanted.config, split=wanted.split, revision=wanted.revision
            )
    except ConnectionError as error:
        raise ToolError(f"cannot be fetched: {first_line(error)}", where=spec) from None
    except (ValueError, OSError, RuntimeError) as error:
        raise DataError(
            f"datasets cannot load it: {first_line(error)}",
            where=spec,
            remedy="Name another split or config: datasets:NAME?config=…&split=…",
        ) from None
    if wanted.column not in loaded.column_names:
        raise DataError(
            f"no column {wanted.column!r}; there are {', '.join(loaded.column_names)}",
            where=spec,
            remedy="Name one of them: column=…",
        )
    yield from loaded


def _fields(row: Mapping[str, Any], wanted: DatasetSpec, spec: str) -> dict[str, str]:
    text = row[wanted.column]
    if not isinstance(text, str):
        raise DataError(f"column {wanted.column!r} holds no text", where=spec)
    kept = {key: str(row[key]) for key in _KEPT if row.get(key) not in (None, "")}
    return {**kept, "text": text}
