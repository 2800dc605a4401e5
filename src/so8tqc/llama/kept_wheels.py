"""Wheels of llama-cpp-python that were compiled here, kept for the environments to come.

pip keeps what it builds in a cache of its own, but not everywhere (``--no-cache-dir``, containers),
and under the package's name alone: neither the compiler's flags nor the CPU are part of its key,
and ggml is compiled for the CPU that builds it. Here a wheel lies in a folder named by all that
decides its bytes, with ``built.json`` beside it, which says so to people and to ``doctor``. (What
pip hands over from its own cache instead of compiling is kept as if it were compiled now; what is
loaded in the end, ``doctor`` looks at itself.)

The noxfile installs by this module, before anything else is there: it imports the standard library
and platformdirs alone, which nox brings.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from so8tqc.llama.pin import PIN

_TOLD = "built.json"


@dataclass(frozen=True)
class Built:
    """What decides the bytes of a wheel.

    Attributes:
        package: the source package, with its version and SHA-256.
        python: the tag of the interpreter, e.g. ``cpython-311-x86_64-linux-gnu``.
        flags: ``CMAKE_ARGS``, as given.
        compiler: the first line of ``c++ --version``; "" if there is none.
        cpu: the SHA-256 of what the CPU says it can do.
    """

    package: str
    python: str
    flags: str
    compiler: str
    cpu: str

    @property
    def name(self) -> str:
        """Of its folder."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{PIN.name}-{PIN.version}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def built_here(flags: str) -> Built:
    """What a wheel would be that is compiled here, now.

    Args:
        flags: ``CMAKE_ARGS`` of the build.
    """
    return Built(
        package=f"{PIN.name} {PIN.version} {PIN.sha256}",
        python=str(sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag),
        flags=flags,
        compiler=_compiler(),
        cpu=_cpu(),
    )


def wheel_folder() -> Path:
    """Where wheels are kept, in the user's cache."""
    from platformdirs import user_cache_path

    return user_cache_path("so8tqc") / "wheels"


def kept(built: Built, root: Path | None = None) -> Path | None:
    """The wheel that was kept of such a build, if there is one.

    Args:
        built: the build.
        root: where wheels are kept; the user's cache by default.
    """
    return next(iter(_wheels((root or wheel_folder()) / built.name)), None)


def keep(wheel: Path, built: Built, root: Path | None = None) -> Path:
    """Keep a wheel; it has its place only when all of it is on the disk.

    Args:
        wheel: the file that was built.
        built: what it was built by.
        root: where wheels are kept; the user's cache by default.

    Returns:
        The wheel that is kept, which may be one that another process kept meanwhile.

    Raises:
        OSError: the cache cannot be written.
    """
    root = root or wheel_folder()
    root.mkdir(parents=True, exist_ok=True)
    folder = root / built.name
    with tempfile.TemporaryDirectory(dir=root) as beside:
        whole = Path(beside) / built.name
        whole.mkdir()
        shutil.copy2(wheel, whole / wheel.name)
        told = json.dumps(asdict(built), indent=2) + "\n"
        (whole / _TOLD).write_text(told, encoding="utf-8")
        for path in whole.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        try:
            whole.rename(folder)
        except OSError:  # another process was first
            if kept(built, root) is None:
                raise
    return folder / wheel.name


def offered(root: Path | None = None) -> Iterator[Path]:
    """Folders with a wheel for this Python and this CPU, whatever its flags: for ``--find-links``.

    Args:
        root: where wheels are kept; the user's cache by default.
    """
    here = built_here("")
    for told in sorted((root or wheel_folder()).glob(f"*/{_TOLD}")):
        try:
            built = Built(**json.loads(told.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
        same = (built.package, built.python, built.cpu) == (here.package, here.python, here.cpu)
        if same and list(_wheels(told.parent)):
            yield told.parent


def _wheels(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.whl"))


def _cpu(path: Path = Path("/proc/cpuinfo")) -> str:
    """By its name and its instruction sets, which the compiler is told to use all of."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    said = {line.partition(":")[0].strip(): line.partition(":")[2] for line in reversed(lines)}
    deciding = [said.get(key, "") for key in ("model name", "flags", "Features")]
    text = "\n".join([platform.machine(), platform.processor(), *deciding])
    return hashlib.sha256(text.encode()).hexdigest()


def _compiler() -> str:
    command = os.environ.get("CXX") or "c++"
    if shutil.which(command) is None:
        return ""
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    return next(iter(done.stdout.splitlines()), "")
