"""Files that others made are read, or refused with one message; nothing else ever happens.

The fixed inputs, in one child process. ``nox -s fuzz`` reads twenty thousand others with the same
code (``python tests/hostile/fuzz.py``), and the whole corpus.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from bombs import BOMBS
from fuzz import Fault, attempt
from readers import BY_NAME, READERS, Reader
from watch import watching

from so8tqc.errors import ConfigError, ExitCode, InputError

FUZZ = Path(__file__).with_name("fuzz.py")
INPUTS = 400


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("fuzz") / "results.json"
    done = subprocess.run(
        [sys.executable, str(FUZZ), "--inputs", str(INPUTS), "--light", "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text("utf-8"))
    return found


@pytest.mark.parametrize("name", [reader.name for reader in READERS])
def test_a_reader_reads_or_refuses(name: str, results: dict[str, Any]) -> None:
    row = results[name]
    assert row["faults"] == []
    assert row["inputs"] == row["read"] + row["refused"]
    light = {bomb.text for bomb in BOMBS if bomb.reader == name and not bomb.heavy}
    assert set(row["corpus"]) == light


def test_most_inputs_are_refused_and_some_are_read(results: dict[str, Any]) -> None:
    """Inputs of which all are refused at the first byte would try nothing."""
    read = sum(row["read"] for row in results.values())
    refused = sum(row["refused"] for row in results.values())
    assert read + refused >= INPUTS * 0.9
    assert read > INPUTS / 20
    assert refused > INPUTS / 3


# --- the watch sees what it is there for: readers that misbehave are found -----------------------


def _reader(read: Any, exit_code: ExitCode = ExitCode.BAD_INPUT) -> Reader:
    return Reader("planted", {"x.json": "json"}, lambda folder: None, read, exit_code)


def _raise(error: BaseException) -> Any:
    raise error


PLANTED = {
    "crashes": (lambda folder: _raise(KeyError("x")), "KeyError"),
    "runs out of memory": (lambda folder: _raise(MemoryError()), "MemoryError"),
    "panics": (lambda folder: _raise(SystemExit(3)), "SystemExit"),
    "has another exit code": (lambda folder: _raise(ConfigError("x", where="x.json")), "exit code"),
    "names no place": (lambda folder: _raise(InputError("bad")), "no place"),
    "writes beside": (lambda folder: (folder / "y").write_text("x"), "open"),
    "writes elsewhere": (lambda folder: (folder.parent / "y").write_text("x"), "open"),
    "removes": (lambda folder: (folder / "x.json").unlink(), "os.remove"),
    "starts a shell": (lambda folder: os.system("true"), "os.system"),
    "starts a process": (lambda folder: subprocess.run(["true"], check=False), "subprocess.Popen"),
    "looks up a host": (lambda folder: _look_up(), "socket.getaddrinfo"),
    "runs the folder's code": (
        lambda folder: exec(compile("1", str(folder / "x.py"), "exec")), "code was run"),
    "takes two gigabytes": (lambda folder: len(bytearray(b"x") * (2 << 30)), "memory grew"),
}  # fmt: skip


def _look_up() -> None:
    with suppress(OSError):
        socket.getaddrinfo("localhost", 1)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name: str, tmp_path: Path) -> None:
    read, said = PLANTED[name]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "x.json").write_text("{}")
    with pytest.raises(Fault, match=said):
        attempt(_reader(read), folder.resolve())


def test_a_reader_that_only_reads_is_not_accused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    read = _reader(lambda folder: (folder / "x.json").read_text())
    assert attempt(read, tmp_path.resolve()) == "read"
    refuse = _reader(lambda folder: _raise(InputError("bad", where="x.json")))
    assert attempt(refuse, tmp_path.resolve()) == "refused"


def test_writing_is_allowed_in_the_output_alone(tmp_path: Path) -> None:
    with watching(tmp_path, writes=True) as watch:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "x").write_text("x")
    assert watch.found == []
    with watching(tmp_path, writes=True) as watch:
        (tmp_path / "outside").write_text("x")
    assert watch.found != []


def test_every_input_of_the_corpus_has_a_reader() -> None:
    assert {bomb.reader for bomb in BOMBS} <= BY_NAME.keys()
    assert len({(bomb.reader, bomb.text) for bomb in BOMBS}) == len(BOMBS)
