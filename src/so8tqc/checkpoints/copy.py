"""Copying a model directory by the cheapest means the file system offers."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

_FICLONE = 0x40049409  # linux/fs.h: share the blocks of another file (btrfs, xfs)
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS}
_COPY_CHUNK = 1 << 30

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


def copy_file(source: Path, destination: Path) -> None:
    """Copy a file's bytes: reflink, else ``copy_file_range``, else a plain copy."""
    if not (_reflink(source, destination) or _copy_range(source, destination)):
        shutil.copyfile(source, destination)


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


def _reflink(source: Path, destination: Path) -> bool:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return False
    with source.open("rb") as reader, destination.open("wb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False
            raise
    return True


def _copy_range(source: Path, destination: Path) -> bool:
    if not hasattr(os, "copy_file_range"):
        return False
    left = source.stat().st_size
    with source.open("rb") as reader, destination.open("wb") as writer:
        while left:
            try:
                done = os.copy_file_range(reader.fileno(), writer.fileno(), min(left, _COPY_CHUNK))
            except OSError as error:
                if error.errno in _UNSUPPORTED:
                    return False
                raise
            if done == 0:
                return False
            left -= done
    return True
