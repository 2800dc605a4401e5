"""Models in several files, ``NAME-00001-of-0000N.gguf`` …: told by their names.

The names are llama.cpp's (``llama_split_path``), and libllama finds the other parts by them alone.
What the parts say of themselves is read in ``gguf.file``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_NAME = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.gguf$", re.IGNORECASE)


class PartName(NamedTuple):
    """What the name of a part says.

    Attributes:
        stem: the model's name, without number and ending.
        number: of this part, 1 for the first.
        total: how many there are.
    """

    stem: str
    number: int
    total: int


def part_name(path: Path) -> PartName | None:
    """What a file's name says of being a part, None if nothing."""
    found = _NAME.match(path.name)
    if found is None:
        return None
    name = PartName(found["stem"], int(found["number"]), int(found["total"]))
    return name if 1 <= name.number <= name.total else None


def part_paths(path: Path) -> tuple[Path, ...]:
    """The names of all parts of the model that a file is a part of, by its own name, in order.

    A file whose name says nothing of parts is the only one.
    """
    name = part_name(path)
    if name is None:
        return (path,)
    return tuple(
        path.with_name(f"{name.stem}-{number:05d}-of-{name.total:05d}{path.suffix}")
        for number in range(1, name.total + 1)
    )


def parts_here(path: Path) -> tuple[Path, ...]:
    """As :func:`part_paths` of a first part if all of them are here, else the file alone."""
    name = part_name(path)
    if name is None or name.number != 1:
        return (path,)
    paths = part_paths(path)
    return paths if all(part.is_file() for part in paths) else (path,)


def bytes_of(path: Path) -> int:
    """Size of a file; of a first part, of the whole model."""
    return sum(part.stat().st_size for part in parts_here(path))


def model_stem(path: Path) -> str:
    """A file's name without its ending and, of a part, without its number."""
    name = part_name(path)
    return path.stem if name is None else name.stem
