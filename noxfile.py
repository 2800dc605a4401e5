"""Tasks: `nox -s demo`, `nox -s tests`, `nox -s lint types docs`, `nox -s bench`.

Every session installs with constraints.txt, which pins torch: an unpinned torch
pulls gigabytes of CUDA. With NOX_LOCKED set, as in CI, it installs exactly what
requirements.lock names, by SHA-256 (`nox -s lock` writes that file).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import nox

sys.path.insert(0, "src")
from so8tqc.llama.kept_wheels import built_here, keep, kept  # needs nothing that nox does not bring

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "docs", "tests"]

# libllama is compiled without the image tools, which nothing here uses; without fusing products and
# sums, so that its quantizers give the same bytes everywhere; and without AMX: GCC before 14 drops
# most of the tile configuration that ggml writes, and its kernels then die (SIGILL)
CMAKE_ARGS = ["-DLLAVA_BUILD=OFF"]
FLAGS = "" if sys.platform == "win32" else "-ffp-contract=off"
if sys.platform == "linux" and platform.machine() == "x86_64":
    FLAGS += " -mno-amx-int8"
if FLAGS:
    CMAKE_ARGS += [f"-DCMAKE_C_FLAGS='{FLAGS}'", f"-DCMAKE_CXX_FLAGS='{FLAGS}'"]
BUILD = {"CMAKE_ARGS": os.environ.get("CMAKE_ARGS", " ".join(CMAKE_ARGS))}


LOCK = Path("requirements.lock")
LOCKED = "NOX_LOCKED" in os.environ
TOOLS = ("ruff", "mypy", "types-PyYAML", "import-linter")
LLAMA = ("llama-cpp-python",)
IMPORT_LINTER = ("import-linter", "grimp", "click", "rich", "markdown-it-py", "mdurl", "pygments")
LINTERS = ("ruff", *IMPORT_LINTER)
"""What ``lint`` installs by the lock, which names no dependencies."""


def locked_requirements(
    session: nox.Session, only: Sequence[str] = (), without: Sequence[str] = ()
) -> Path:
    """A requirements file of what the lock names, or of some of it."""
    requirements = re.split(r"\n(?=\w)", LOCK.read_text(encoding="utf-8"))

    def wanted(requirement: str) -> bool:
        name = requirement.split("==", maxsplit=1)[0]
        return name not in without and (not only or name in only)

    chosen = Path(session.create_tmp()) / "requirements.txt"
    chosen.write_text("\n".join(filter(wanted, requirements)), encoding="utf-8")
    return chosen


def install_locked(
    session: nox.Session, only: Sequence[str] = (), without: Sequence[str] = ()
) -> None:
    """Install what the lock names, or only some of it; a file with another digest is refused."""
    chosen = locked_requirements(session, only, without)
    session.install("--require-hashes", "--no-deps", "-r", str(chosen))
    if not only:
        session.install("--no-deps", "-e", ".")


def install_llama(session: nox.Session) -> None:
    """Install llama-cpp-python as it was compiled here before, or compile it and keep the wheel."""
    built = built_here(BUILD["CMAKE_ARGS"])
    wheel = kept(built)
    if wheel is None:
        if shutil.which("cmake") is None or shutil.which("c++") is None:
            session.warn("A C++ compiler and cmake are needed to build llama-cpp-python.")
        session.log(
            "llama-cpp-python is compiled from source unless pip has its wheel in the cache: "
            "6 to 9 minutes on two cores, once."
        )
        folder = Path(session.create_tmp()) / "wheels"
        shutil.rmtree(folder, ignore_errors=True)
        what = ("-c", "constraints.txt", *LLAMA)
        if LOCKED:
            what = ("--require-hashes", "-r", str(locked_requirements(session, only=LLAMA)))
        session.run_install(
            "python", "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder), *what,
            env=BUILD,
        )  # fmt: skip
        (wheel,) = folder.glob("*.whl")
        try:
            wheel = keep(wheel, built)
        except OSError as error:
            session.warn("The wheel is not kept for other environments: %s", error)
    session.install("--no-deps", str(wheel))


def install(session: nox.Session, extras: str) -> None:
    """Install the package with extras, saying beforehand what takes long."""
    session.log("Installing so8tqc[%s] and torch (a few hundred MB of wheels).", extras)
    install_llama(session)
    if LOCKED:
        install_locked(session, without=LLAMA)
        return
    # torch first and by its pin: resolved on its own it would be a CUDA build
    session.install("-c", "constraints.txt", "torch")
    session.install("-c", "constraints.txt", "-e", f".[{extras}]")


@nox.session
def demo(session: nox.Session) -> None:
    """The whole pipeline on SmolLM2-135M, quick; in full with `-- --full`; exit code: verdict."""
    install(session, "demo")
    chosen = [] if {"--full", "--quick"} & set(session.posargs) else ["--quick"]
    session.run("so8tqc", "demo", *chosen, *session.posargs, success_codes=[0])


@nox.session
def tests(session: nox.Session) -> None:
    """All tests but the demo chain; `nox -s tests -- -m demo` runs that."""
    install(session, "demo,test")
    session.run("so8tqc", "vendor", "--quiet")
    # a process for each core, of 1 GB or two; what the tests of a file share is made once
    processes = ("-n", "logical", "--maxprocesses", "4", "--dist", "loadfile")
    spread = () if session.posargs else processes
    # one thread each: on models this small a second one only waits, and keeps a core busy with it
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    session.run("pytest", *spread, *session.posargs, env=environment)


@nox.session
def peers(session: nox.Session) -> None:
    """Temperatures and ECE against netcal's, on drawn logits and on the demo model's."""
    install(session, "demo,test,peers")
    session.run(
        "pytest", "tests/metrics/test_peers.py", "-m", "", *session.posargs,
        env={"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


@nox.session
def fuzz(session: nox.Session) -> None:
    """Hostile files: every reader, 20,000 inputs and the whole corpus (see tests/hostile)."""
    install(session, "test")
    arguments = session.posargs or ["--inputs", "20000", "--out", "fuzz.json"]
    session.run("python", "tests/hostile/fuzz.py", *arguments)
    if not session.posargs:
        session.run("python", "tests/hostile/fuzz_rows.py", "fuzz.json")
        session.run("python", "tests/reliability/tested_rows.py")
        session.run("python", "tests/reliability/reliability_page.py")


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
    """Format, lint, and the floors of the house: imports point down (sources are only read)."""
    if LOCKED:
        install_locked(session, only=LINTERS)
    else:
        session.install("-c", "constraints.txt", "ruff", "import-linter")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": "src"})


@nox.session
def types(session: nox.Session) -> None:
    """mypy --strict on src/."""
    if LOCKED:
        install_locked(session, without=LLAMA)
    else:
        session.install("-c", "constraints.txt", "torch")
        session.install("-c", "constraints.txt", "-e", ".", "mypy", "types-PyYAML")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The pages, as a site in site/; any warning fails."""
    if LOCKED:
        install_locked(session, without=LLAMA)
    else:
        session.install("-c", "constraints.txt", "torch")
        session.install("-c", "constraints.txt", "-e", ".[docs]")
    session.run("python", "tests/docs/write_pages.py")
    session.run("zensical", "build", "--clean", "--strict")
    session.run("python", "tests/docs/foreign_assets.py", "site")


@nox.session
def architectures(session: nox.Session) -> None:
    """Every text-generation type of transformers, built small and swept: docs/architectures.md.

    Arguments are types; without any, all (under an hour on two cores).
    """
    install(session, "test,llama,demo")
    folder = Path("tests/architectures")
    session.run("python", str(folder / "sweep_tokenizer.py"), session.create_tmp())
    if not session.posargs:
        (folder / "results.jsonl").unlink(missing_ok=True)
    session.run(
        "python", "-W", "ignore", str(folder / "sweep.py"), str(folder / "results.jsonl"),
        session.create_tmp(), *session.posargs,
        env={"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    session.run("python", str(folder / "page.py"))


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks; each prints ratios against a peer or a limit measured in the same run."""
    install(session, "demo,test,peers")
    scripts = session.posargs or [
        "bake.py", "evaluation.py", "capture.py", "export.py", "keep_f32.py", "quantize.py",
        "temperature.py", "calibrate.py", "monitor.py", "longtext.py", "startup.py",
    ]  # fmt: skip
    for script in scripts:
        session.run("python", f"benchmarks/{script}")


@nox.session
def lock(session: nox.Session) -> None:
    """Write requirements.lock: all that lint, types, docs and tests need, by SHA-256."""
    session.install("pip-tools")
    tools = Path(session.create_tmp()) / "tools.in"
    tools.write_text("\n".join(("torch", *TOOLS)), encoding="utf-8")
    session.run(
        "pip-compile", "--quiet", "--generate-hashes", "--strip-extras", "--allow-unsafe",
        "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links",
        "--constraint", "constraints.txt", "--extra", "demo", "--extra", "test", "--extra", "docs",
        "--output-file", str(LOCK), "pyproject.toml", str(tools), *session.posargs,
    )  # fmt: skip
    # the extras name this package itself, which then stands there by its folder, without a digest
    parts = re.split(r"\n(?=[\w#])", LOCK.read_text(encoding="utf-8").rstrip())
    kept = [part for part in parts if not part.startswith(("so8tqc ", "#"))]
    LOCK.write_text("\n".join(kept) + "\n", encoding="utf-8")
