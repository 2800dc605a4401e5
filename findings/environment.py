"""A finding's own environment: pinned public packages in a temporary folder, nothing of ours."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

INSIDE = "--inside"


def main(script: str, packages: Sequence[str], look: Callable[[], bool]) -> None:
    """Install the packages, run the script among them, and exit as it does.

    Exit code 0: the behaviour is as described; 1: it has changed.

    Args:
        script: ``__file__`` of the finding.
        packages: pinned requirements.
        look: shows the behaviour; whether it is as described.
    """
    if INSIDE in sys.argv:
        sys.exit(0 if look() else 1)
    with tempfile.TemporaryDirectory(prefix="finding-") as scratch:
        venv.create(scratch, with_pip=True)
        python = Path(scratch) / ("Scripts" if os.name == "nt" else "bin") / "python"
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *packages], check=True)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run([python, script, INSIDE], check=False, env=environment)
    sys.exit(done.returncode)
