"""An export that lacks the converter: asked for on a terminal, fetched if allowed, else refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from so8tqc.cli import stage
from so8tqc.cli.main import run as run_main
from so8tqc.errors import ToolError
from so8tqc.llama import vendor
from so8tqc.services.export import service

FETCHED = "this stands for a download"


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A vendor directory without a converter; what would fetch one says so."""

    def fetch(progress: object) -> None:
        raise ToolError(FETCHED)

    monkeypatch.setattr(vendor, "vendor_directory", lambda: tmp_path / "vendor")
    monkeypatch.setattr(service, "fetch_converter", fetch)
    return tmp_path / "model.gguf"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_somebody_answers", lambda: True)


def export(model: Path, out: Path, *options: str) -> int:
    return run_main(["export", str(model), "--out", str(out), "--quiet", *options])


def test_without_a_terminal_it_is_an_error_with_the_command(
    llama: Path, nowhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(llama, nowhere) == 4
    told = " ".join(capsys.readouterr().err.split())
    assert "so8tqc vendor" in told
    assert "--yes" in told
    assert "llama-cpp-python 0.3.36" in told
    assert FETCHED not in told
    assert not nowhere.exists()


def test_yes_fetches_without_asking(
    llama: Path, nowhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(llama, nowhere, "--yes") == 4
    assert FETCHED in capsys.readouterr().err


def test_so_does_the_variable(
    llama: Path,
    nowhere: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SO8TQC_VENDOR", "auto")
    assert export(llama, nowhere) == 4
    assert FETCHED in capsys.readouterr().err
    monkeypatch.setenv("SO8TQC_VENDOR", "always")
    assert export(llama, nowhere) == 2


@pytest.mark.parametrize(("answer", "expected"), [("y\n", True), ("\n", True), ("n\n", False)])
def test_a_terminal_is_asked_by_name(
    answer: str,
    expected: bool,
    llama: Path,
    nowhere: Path,
    terminal: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def read(prompt: str = "") -> str:
        asked.append(prompt)
        return answer.strip()

    monkeypatch.setattr(sys.modules[typer.confirm.__module__], "visible_prompt_func", read)
    assert export(llama, nowhere) == 4
    told = " ".join(capsys.readouterr().err.split())
    assert "llama-cpp-python 0.3.36" in told + " ".join(asked)
    assert len(asked) == 1
    assert (FETCHED in told) == expected
    assert ("so8tqc vendor" in told) == (not expected)


def test_a_checkout_that_was_given_is_not_asked_about(
    llama: Path, nowhere: Path, terminal: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkout").mkdir()
    assert export(llama, nowhere, "--llama-cpp", str(tmp_path / "checkout")) == 2
    assert "Fetch" not in capsys.readouterr().err


def test_a_pipe_is_never_asked(llama: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from so8tqc.llama import vendor; "
        f"vendor.vendor_directory = lambda: Path({str(tmp_path / 'none')!r}); "
        "from so8tqc.cli.main import run; "
        f"sys.exit(run(['export', {str(llama)!r}, '--out', {str(tmp_path / 'x.gguf')!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input="y\n", capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 4
    assert "so8tqc vendor" in done.stderr
