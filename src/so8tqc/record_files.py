"""Records as files: where they lie, how they are written and read."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from so8tqc.disk.atomic import write_text
from so8tqc.disk.foreign import read_whole
from so8tqc.errors import InputError
from so8tqc.records import Record


def record_beside(out: Path) -> Path:
    """The path of the record of an output that is one file, or one directory as a whole."""
    return out.with_name(f"{out.name}.record.json")


def write_record(path: Path, record: Record) -> None:
    """Write a record as indented JSON, atomically."""
    write_text(path, record.model_dump_json(indent=2) + "\n")


def read_record(path: Path) -> Record:
    """Read a record written by :func:`write_record`.

    Raises:
        InputError: the file is missing or is not a record of this schema.
    """
    if not path.exists():
        raise InputError("no record here", where=str(path))
    content = read_whole(path)
    try:
        return Record.model_validate_json(content)
    except ValidationError as error:
        raise InputError(
            f"not a record of this version: {error.errors()[0]['msg']}", where=str(path)
        ) from None
