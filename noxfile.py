"""Tasks: `nox -s demo`, `nox -s tests`, `nox -s lint types`, `nox -s bench`.

Every session installs with constraints.txt, which pins torch: an unpinned torch
pulls gigabytes of CUDA.
"""

from __future__ import annotations

import os
import shutil

import nox

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests"]

# libllama is compiled without the image tools, which nothing here uses
BUILD = {"CMAKE_ARGS": os.environ.get("CMAKE_ARGS", "-DLLAVA_BUILD=OFF")}


def install(session: nox.Session, extras: str) -> None:
    """Install the package with extras, saying beforehand what takes long."""
    session.log("Installing so8tqc[%s] and torch (a few hundred MB of wheels).", extras)
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        session.warn("A C++ compiler and cmake are needed to build llama-cpp-python.")
    session.log(
        "llama-cpp-python is compiled from source unless pip has its wheel in the cache: "
        "6 to 9 minutes on two cores, once."
    )
    # torch first and by its pin: resolved on its own it would be a CUDA build
    session.install("-c", "constraints.txt", "torch")
    session.install("-c", "constraints.txt", "-e", f".[{extras}]", env=BUILD)


@nox.session
def demo(session: nox.Session) -> None:
    """The whole pipeline on SmolLM2-135M; exit code is the verdict."""
    install(session, "demo")
    session.run("so8tqc", "demo", *session.posargs, success_codes=[0])


@nox.session
def tests(session: nox.Session) -> None:
    """All tests but the demo chain; `nox -s tests -- -m demo` runs that."""
    install(session, "demo,test")
    session.run("so8tqc", "vendor", "--quiet")
    session.run("pytest", *session.posargs, env={"HF_HUB_OFFLINE": "1"})


@nox.session
def peers(session: nox.Session) -> None:
    """Temperatures and ECE against netcal's, on drawn logits and on the demo model's."""
    install(session, "demo,test,peers")
    session.run(
        "pytest", "tests/metrics/test_peers.py", "-m", "", *session.posargs,
        env={"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


@nox.session
def crash(session: nox.Session) -> None:
    """Every stage killed and refused by the disk at every operation; writes crash.json."""
    install(session, "test")
    session.run("so8tqc", "vendor", "--quiet")
    session.run(
        "pytest", "tests/reliability", "-m", "", "--crash-results", *session.posargs,
        env={"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


@nox.session
def lint(session: nox.Session) -> None:
    """Format and lint."""
    session.install("-c", "constraints.txt", "ruff")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """mypy --strict on src/."""
    session.install("-c", "constraints.txt", "torch")
    session.install("-c", "constraints.txt", "-e", ".", "mypy", "types-PyYAML")
    session.run("mypy")


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks; each prints ratios against a peer or a limit measured in the same run."""
    install(session, "demo,test,peers")
    scripts = session.posargs or [
        "bake.py", "evaluation.py", "capture.py", "export.py", "keep_f32.py", "quantize.py",
        "temperature.py", "monitor.py", "longtext.py",
    ]  # fmt: skip
    for script in scripts:
        session.run("python", f"benchmarks/{script}")
