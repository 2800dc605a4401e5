"""Where the built calibration set lies, and how it is found by its name."""

from __future__ import annotations

from pathlib import Path

from so8tqc.config import CALIBRATION_TEXTS
from so8tqc.corpus.manifest import Result, read_corpus_manifest
from so8tqc.disk.digests import sha256_file
from so8tqc.errors import DataError, MissingToolError
from so8tqc.resources import user_cache

BUILD_COMMAND = "so8tqc data"


def built_path(result: Result) -> Path:
    """The built set's place in the user's cache; its name has the digest, so sets never mix."""
    return user_cache() / f"calibration-{result.sha256[:12]}.jsonl"


def calibration_file() -> Path:
    """The built set that the manifest pins.

    Raises:
        MissingToolError: it has not been built.
        DataError: the file was changed since.
    """
    result = read_corpus_manifest().result
    path = built_path(result)
    if not path.is_file():
        raise MissingToolError(
            f"{CALIBRATION_TEXTS} has not been built on this machine: its texts come from "
            "packages and are not part of so8tqc",
            remedy=f"Run: {BUILD_COMMAND}",
        )
    if sha256_file(path) != result.sha256:
        raise DataError(
            "is not what was built", where=str(path), remedy=f"Run again: {BUILD_COMMAND}"
        )
    return path
