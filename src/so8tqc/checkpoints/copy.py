"""Copying a model directory by the cheapest means the file system offers."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import NamedTuple

from so8tqc.errors import ModelError

_FICLONE = 0x40049409  # linux/fs.h: share the blocks of another file (btrfs, xfs)
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS}
_COPY_BYTES = 16 << 20  # at a time: the disk writes them while the next ones are copied
_BUFFER_BYTES = 4 << 20

OTHER_WEIGHTS = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".safetensors",
)
"""Weights in files that a bake does not change: copied along, they would be unbaked twins."""


class Run(NamedTuple):
    """A range of bytes to copy: where it starts in the old and the new file, and its length."""

    source: int
    destination: int
    length: int


def create(path: Path, size: int, clone: Path | None) -> bool:
    """Create a file of ``size`` zero bytes, or, where the file system can, a clone of another.

    Returns:
        Whether it is a clone: it shares the other's blocks until either is written to.
    """
    with path.open("xb") as stream:
        if clone is not None and _reflink(clone, stream.fileno()):
            return True
        stream.truncate(size)
    return False


def copy_runs(source: Path, destination: Path, runs: Sequence[Run], stop: Event) -> None:
    """Copy ranges of one file into another that exists, and write them to disk.

    Args:
        source: the file to read.
        destination: a file that is large enough; other ranges of it may be written meanwhile.
        runs: the ranges.
        stop: set by another thread, it ends the copy early.

    Raises:
        ModelError: the source ends before a run does.
    """
    with source.open("rb", buffering=0) as reader, destination.open("r+b", buffering=0) as writer:
        copy = _copy_range if hasattr(os, "copy_file_range") else _copy_plain
        for run in runs:
            done = 0
            while done < run.length and not stop.is_set():
                part = Run(run.source + done, run.destination + done, run.length - done)
                try:
                    count = copy(reader.fileno(), writer.fileno(), part)
                except OSError as error:
                    if copy is _copy_plain or error.errno not in _UNSUPPORTED:
                        raise
                    copy = _copy_plain
                    continue
                if count == 0:
                    raise ModelError("the file ended early", where=str(source))
                start_writing(writer.fileno(), part.destination, count)
                done += count
        os.fsync(writer.fileno())


def companion_files(directory: Path, shards: tuple[Path, ...]) -> tuple[list[Path], list[Path]]:
    """Files beside the weights: (those that come along, other weights that do not).

    Config, tokenizer, generation config, chat template, licence and anything else come
    along, subdirectories included. Hidden files and directories (download caches) do not.
    """
    keep: list[Path] = []
    leave: list[Path] = []
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        if not path.is_file() or path in shards or any(p.startswith(".") for p in relative.parts):
            continue
        (leave if path.suffix in OTHER_WEIGHTS else keep).append(path)
    return keep, leave


def copy_companions(base: Path, weights: tuple[Path, ...], directory: Path) -> list[str]:
    """Copy what belongs to a model beside its weights; notices of what is left behind.

    Args:
        base: the model directory.
        weights: its files of weights.
        directory: an existing one.
    """
    keep, leave = companion_files(base, weights)
    for file in keep:
        destination = directory / file.relative_to(base)
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, destination)
    if not leave:
        return []
    names = ", ".join(file.name for file in leave[:5])
    return [f"Left behind, since these weights would not be baked: {names}."]


def _reflink(source: Path, destination: int) -> bool:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return False
    with source.open("rb") as reader:
        try:
            fcntl.ioctl(destination, _FICLONE, reader.fileno())
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False
            raise
    return True


def start_writing(file: int, start: int, count: int) -> None:
    """Let the disk write a range now rather than at the final fsync, where that can be said.

    Linux answers "will not be needed" by starting to write what is not on disk yet.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, count, os.POSIX_FADV_DONTNEED)


def _copy_range(reader: int, writer: int, run: Run) -> int:
    return os.copy_file_range(
        reader, writer, min(run.length, _COPY_BYTES), run.source, run.destination
    )


def _copy_plain(reader: int, writer: int, run: Run) -> int:
    os.lseek(reader, run.source, os.SEEK_SET)
    os.lseek(writer, run.destination, os.SEEK_SET)
    return os.write(writer, os.read(reader, min(run.length, _BUFFER_BYTES)))
