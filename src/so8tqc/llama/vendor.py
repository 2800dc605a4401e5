"""The converter: fetched from the pinned source package, or found in a checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from so8tqc.disk.atomic import atomic_directory, atomic_file
from so8tqc.disk.digests import sha256_file
from so8tqc.disk.locks import claim_folder
from so8tqc.errors import ConfigError, MissingToolError, ToolError
from so8tqc.llama.pin import PIN, Pin
from so8tqc.progress import SILENT, Progress
from so8tqc.resources import repository_root

SCRIPT = "convert_hf_to_gguf.py"
_WANTED = ("conversion", "gguf-py", "LICENSE", SCRIPT)
_INSIDE = PurePosixPath("vendor/llama.cpp")
_STAMP = "SOURCE"
_FETCH_TIMEOUT_SECONDS = 900
_MEGABYTES = 77  # of the pinned package


@dataclass(frozen=True)
class Converter:
    """A usable converter.

    Attributes:
        script: ``convert_hf_to_gguf.py``.
        python_path: directory to put first on PYTHONPATH (its gguf-py), None if absent.
        revision: the pinned package it came from, or the checkout's path.
    """

    script: Path
    python_path: Path | None
    revision: str


def vendor_directory() -> Path:
    """``vendor/llama.cpp`` of the checkout, or the user data directory of a wheel."""
    root = repository_root()
    if root is not None:
        return root / "vendor" / "llama.cpp"
    from platformdirs import user_data_path

    return user_data_path("so8tqc") / "llama.cpp"


def find_converter(llama_cpp: Path | None = None) -> Converter:
    """The converter of ``llama_cpp``, else the vendored one.

    Raises:
        ConfigError: ``llama_cpp`` has no converter.
        MissingToolError: nothing was vendored.
    """
    directory = llama_cpp or vendor_directory()
    script = directory / SCRIPT
    if not script.is_file():
        if llama_cpp is not None:
            raise ConfigError(f"{SCRIPT} is not here", where=str(llama_cpp))
        raise MissingToolError(
            f"the GGUF converter is not here yet; it comes with {download()}",
            remedy="Fetch it: so8tqc vendor (or export with --yes, or SO8TQC_VENDOR=auto).",
        )
    gguf_py = directory / "gguf-py"
    stamp = directory / _STAMP
    revision = stamp.read_text(encoding="utf-8").strip() if stamp.is_file() else str(directory)
    return Converter(script, gguf_py if gguf_py.is_dir() else None, revision)


def download(pin: Pin = PIN) -> str:
    """What :func:`fetch_converter` fetches, for people."""
    return f"the source package {pin.name} {pin.version} ({_MEGABYTES} MB, SHA-256 checked)"


def is_vendored(pin: Pin = PIN) -> bool:
    """Whether the vendored converter is the pinned one."""
    stamp = vendor_directory() / _STAMP
    return stamp.is_file() and stamp.read_text(encoding="utf-8").strip() == _revision(pin)


def fetch_converter(progress: Progress = SILENT, pin: Pin = PIN) -> Converter:
    """Download the pinned source package with pip, check it, unpack the converter.

    Raises:
        ToolError: pip fails, or the package is not the pinned one.
    """
    directory = vendor_directory()
    with (
        claim_folder(directory, wait=True),
        tempfile.TemporaryDirectory(prefix="so8tqc-") as scratch,
    ):
        if is_vendored(pin):  # by the process that was waited for
            return find_converter()
        with progress.task(f"fetching {pin.name} {pin.version} (source, {_MEGABYTES} MB)") as task:
            package = _download(pin, Path(scratch))
            task.advance(1)
        digest = sha256_file(package)
        if digest != pin.sha256:
            raise ToolError(
                f"SHA-256 is {digest}, pinned is {pin.sha256}; nothing was unpacked",
                where=package.name,
            )
        unpacked = Path(scratch) / "unpacked"
        _unpack(package, unpacked)
        (unpacked / _STAMP).write_text(_revision(pin) + "\n", encoding="utf-8")
        _install(unpacked, directory)
    return find_converter()


def _revision(pin: Pin) -> str:
    return f"{pin.name} {pin.version} sha256:{pin.sha256}"


def _download(pin: Pin, scratch: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        pin.name,
        "--dest",
        str(scratch),
        f"{pin.name}=={pin.version}",
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_FETCH_TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise ToolError("pip did not finish in time", where=" ".join(command[3:])) from None
    found = sorted(scratch.glob("*.tar.gz"))
    if done.returncode != 0 or len(found) != 1:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ToolError(
            f"pip cannot fetch {pin.name} {pin.version}: {last}",
            remedy="Check the network or give a llama.cpp checkout with --llama-cpp DIR.",
        )
    return found[0]


def _unpack(package: Path, destination: Path) -> None:
    """Extract only the converter's files; the filter refuses links and paths that lead outside."""
    with tarfile.open(package, "r:gz") as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts[1:]  # without the package's own folder
            relative = PurePosixPath(*parts)
            if not relative.is_relative_to(_INSIDE):
                continue
            inner = relative.relative_to(_INSIDE)
            if inner.parts and inner.parts[0] in _WANTED and member.isfile():
                member.name = str(inner)
                archive.extract(member, destination, filter="data")
    if not (destination / SCRIPT).is_file():
        raise ToolError(f"the package holds no {SCRIPT}", where=package.name)


def _install(unpacked: Path, directory: Path) -> None:
    """Replace the vendored files; a killed run leaves no script, rather than a mixture."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in (SCRIPT, _STAMP):
        (directory / name).unlink(missing_ok=True)
    for name in (*_WANTED, _STAMP):
        source, target = unpacked / name, directory / name
        if source.is_dir():
            with atomic_directory(target) as temporary:
                shutil.copytree(source, temporary, dirs_exist_ok=True)
        elif source.is_file():
            with atomic_file(target) as temporary:
                shutil.copyfile(source, temporary)
