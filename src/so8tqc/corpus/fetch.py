"""Package files: downloaded by their registry's own client, or found in a directory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from so8tqc.corpus.manifest import Source
from so8tqc.disk.digests import sha256_file
from so8tqc.errors import ToolError

_TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Missing:
    """A package that could not be had, and why."""

    source: Source
    reason: str


def locate(source: Source, directory: Path) -> Path | Missing:
    """The source's file in a directory of downloaded packages.

    Raises:
        ToolError: a file of that name is there, and is not the pinned one.
    """
    path = directory / source.file
    return _checked(source, path) if path.is_file() else Missing(source, f"no {source.file}")


def download(source: Source, directory: Path) -> Path | Missing:
    """Fetch the pinned version into ``directory``; no code of the package is run.

    pip is restricted to wheels (a source package would run its build backend), npm to
    ``pack`` without scripts, apt to ``download``, which installs nothing.

    Raises:
        ToolError: what was served is not the pinned file.
    """
    command = download_command(source, directory)
    if command[0] != sys.executable and shutil.which(command[0]) is None:
        return Missing(source, f"{command[0]} is not installed")
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Missing(source, f"{source.client} did not finish in {_TIMEOUT_SECONDS} s")
    if done.returncode != 0:
        return Missing(source, _last_line(done.stderr, done.returncode))
    path = directory / source.file
    if not path.is_file():
        return Missing(source, f"{source.client} gave another file than {source.file}")
    return _checked(source, path)


def download_command(source: Source, directory: Path) -> list[str]:
    """The client's command line."""
    match source.client:
        case "pip":
            return [
                sys.executable, "-m", "pip", "download", "--quiet", "--no-input",
                "--disable-pip-version-check", "--retries", "1", "--no-deps",
                "--only-binary", ":all:", "--dest", str(directory),
                f"{source.package}=={source.version}",
            ]  # fmt: skip
        case "npm":
            return [
                "npm", "pack", "--silent", "--ignore-scripts", "--fetch-retries=1",
                "--pack-destination", str(directory), f"{source.package}@{source.version}",
            ]  # fmt: skip
        case "apt":
            return [
                "apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root",
                f"{source.package}={source.version}",
            ]  # fmt: skip


def _checked(source: Source, path: Path) -> Path:
    digest = sha256_file(path)
    if digest != source.sha256:
        raise ToolError(
            f"SHA-256 is {digest}, pinned is {source.sha256}; it is not read",
            where=f"{source.name} {source.version}: {path.name}",
        )
    return path


def _last_line(message: str, code: int) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1][:200] if lines else f"exit code {code}"
