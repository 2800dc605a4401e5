"""No command asks a network for anything unless a hub's id was given."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BLOCK = """
import os, socket, sys

LOOK_UPS = ("socket.getaddrinfo", "socket.gethostbyname")

def hook(event, arguments):
    reaches = event in ("socket.connect", "socket.sendto")
    # sockets within this machine's file system are no network
    if event in LOOK_UPS or (reaches and arguments[0].family != socket.AF_UNIX):
        with open(os.environ["SEEN"], "a") as seen:
            seen.write(f"{sys.argv} {event} {arguments}\\n")
        raise OSError(f"{event}: the network is blocked")

sys.addaudithook(hook)
"""


@pytest.fixture
def blocked(tmp_path: Path) -> Callable[..., str]:
    """Run ``python ARGUMENTS`` without a network, children included; what they wanted of one."""
    site, seen = tmp_path / "site", tmp_path / "seen"
    site.mkdir()
    (site / "sitecustomize.py").write_text(BLOCK)
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE",)}
    path = f"{site}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    environment |= {"PYTHONPATH": path, "SEEN": str(seen)}

    def run(*arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return seen.read_text() if seen.exists() else ""

    return run


def test_bake_qc_and_report_ask_nobody(
    llama: Path, make_gates: Callable[..., Path], blocked: Callable[..., str], tmp_path: Path
) -> None:
    """``HF_HUB_OFFLINE`` is not set: the commands themselves keep off."""
    gates, run = make_gates(llama), tmp_path / "run"
    command = ("-m", "so8tqc")
    assert blocked(*command, "bake", llama, gates, "--out", run / "bake" / "model") == ""
    said = blocked(
        *command,
        "qc",
        "--reference",
        llama,
        "--rotations",
        gates,
        "--candidate",
        run / "bake" / "model",
        "--level",
        "files",
        "--out",
        run / "qc",
    )
    assert said == ""
    assert blocked(*command, "report", run) == ""


def test_a_model_that_is_run_asks_nobody(
    llama: Path,
    make_gates: Callable[..., Path],
    texts_file: Path,
    blocked: Callable[..., str],
    tmp_path: Path,
) -> None:
    gates = make_gates(llama)
    command = ("-m", "so8tqc")
    assert blocked(*command, "bake", llama, gates, "--out", tmp_path / "model") == ""
    said = blocked(
        *command,
        "qc",
        "--reference",
        llama,
        "--rotations",
        gates,
        "--candidate",
        tmp_path / "model",
        "--data",
        texts_file,
        "--max-tokens",
        16,
        "--out",
        tmp_path / "qc",
    )
    assert said == ""


def test_who_asks_is_seen(blocked: Callable[..., str]) -> None:
    """The block itself: a look-up, and a connection to an address."""
    code = (
        "import contextlib, socket\n"
        "with contextlib.suppress(OSError): socket.create_connection(('192.0.2.1', 80), 1)\n"
        "with contextlib.suppress(OSError): socket.socket().connect(('192.0.2.1', 80))\n"
    )
    seen = blocked("-c", code)
    assert "socket.getaddrinfo" in seen
    assert "socket.connect" in seen
