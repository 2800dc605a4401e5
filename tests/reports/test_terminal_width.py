"""What the commands print fits 80 columns, and is plain text in a pipe."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.cells import cell_len

from so8tqc.cli.main import run as run_main
from so8tqc.cli.show import show
from so8tqc.languages import Language
from so8tqc.record_files import read_record
from so8tqc.reports.language import spoken

pytestmark = pytest.mark.llama

COLUMNS = 80
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PATH = re.compile(r"(?:\S+: )?/\S+")
"""A line that is a path: it is copied as a whole, so it is never broken."""

CUT = re.compile(r"\S*\S…\S*")
"""A cell that was too long: an interval has blanks around its dots."""

STAGES = ("bake", "export", "quantize", "calibrate", "qc", "choose", "longtext")
COMMANDS = (
    "run",
    "demo",
    "bake",
    "export",
    "quantize",
    "calibrate",
    "capture",
    "qc",
    "longtext",
    "report",
    "attest",
    "verify",
    "explain",
    "doctor",
    "vendor",
    "data",
    "config",
)


def too_wide(text: str) -> list[str]:
    return [
        line for line in text.split("\n") if cell_len(line) > COLUMNS and not PATH.fullmatch(line)
    ]


def padded(text: str) -> list[str]:
    return [line for line in text.split("\n") if line != line.rstrip()]


def piped(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a child whose output is a pipe, in an environment without hints of a width."""
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR")}
    return subprocess.run(
        [sys.executable, "-m", "so8tqc", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )


def on_a_terminal(*arguments: str) -> str:
    """What the command writes on a terminal of 80 columns and 24 lines."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    unwanted = ("COLUMNS", "LINES", "NO_COLOR", "TERM", "CI")
    environment = {k: v for k, v in os.environ.items() if k not in unwanted}
    with subprocess.Popen(
        [sys.executable, "-m", "so8tqc", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**environment, "TERM": "xterm-256color"},
    ):
        os.close(theirs)
        shown = b""
        while chunk := _read(ours):
            shown += chunk
    os.close(ours)
    return shown.decode("utf-8")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux says EIO when the last writer has gone
        return b""


@pytest.mark.parametrize("language", Language)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_fits(
    stage: str,
    language: Language,
    real_run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    with spoken(language):
        show(read_record(real_run / stage / "record.json"), real_run / stage / "report.html")
    text = capsys.readouterr().out
    assert len(text) > 200
    assert too_wide(text) == []
    assert padded(text) == []
    assert CUT.findall(text) == []


def test_a_report_and_a_run_are_plain_in_a_pipe(real_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"  # JSON is YAML
    file.write_text(json.dumps(read_record(real_run / "record.json").config), encoding="utf-8")
    for arguments in (("report", str(real_run)), ("run", str(file))):
        done = piped(*arguments)
        assert done.returncode == 1, done.stderr  # the Q4_K_M file fails
        assert "FAIL kl.top1 of tiny-Q4_K_M.gguf" in done.stdout
        for text in (done.stdout, done.stderr):
            assert text
            assert "\x1b" not in text
            assert "\r" not in text
            assert too_wide(text) == []
            assert padded(text) == []


def test_a_terminal_of_80_columns_has_colours_and_no_line_too_long(real_run: Path) -> None:
    shown = on_a_terminal("report", str(real_run))
    assert "\x1b[" in shown
    plain = ESCAPE.sub("", shown).replace("\r", "\n")  # a bar is drawn over the one before
    assert "FAIL kl.top1 of tiny-Q4_K_M.gguf" in plain
    assert too_wide(plain) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    assert run_main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage" in text
    assert too_wide(text) == []


def test_the_plan_of_a_bake_and_the_doctor_fit(
    real_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    config = read_record(real_run / "record.json").config
    base, gates, out = str(config["base"]), str(config["rotations"]), str(tmp_path / "baked")
    assert run_main(["bake", base, gates, "--out", out, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "largest" in plan
    assert padded(plan) == []
    assert run_main(["doctor"]) == 0
    assert too_wide(plan + capsys.readouterr().out) == []


def test_a_line_too_long_is_seen() -> None:
    assert too_wide("x" * 80) == []
    assert too_wide("x" * 81) == ["x" * 81]
    assert too_wide("漢" * 41) == ["漢" * 41]
    assert too_wide("report: /" + "x" * 99) == []
    assert too_wide("a report: /" + "x" * 99) != []
