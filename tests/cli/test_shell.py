"""What a shell expects: help, JSON, quiet, no colour, plain pipes, Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from so8tqc.cli import progress as terminal
from so8tqc.cli.app import app
from so8tqc.cli.main import run as run_main
from so8tqc.cli.progress import terminal_progress
from so8tqc.llama.vendor import is_vendored

COMMAND = [sys.executable, "-m", "so8tqc"]
WITHOUT_RECORD = {"config schema", "config show", "explain"}
"""Their result is the text they print: nothing to be quiet about."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9][;m]")


def commands(group: object, *path: str) -> Iterator[tuple[str, object]]:
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        if hasattr(command, "commands"):
            yield from commands(command, *path, name)
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("name", [*COMMANDS, "config"])
def test_every_command_explains_itself_with_an_example(name: str) -> None:
    result = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    said = re.sub(r"\s+", " ", result.output)
    assert f"so8tqc {name}" in said.partition("Examples")[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_speak_json_and_be_quiet(name: str) -> None:
    options = {option for p in COMMANDS[name].params for option in p.opts}  # type: ignore[attr-defined]
    assert "--help" not in options
    if name != "config schema":  # which prints nothing but JSON
        assert "--json" in options
    if name not in WITHOUT_RECORD:
        assert {"--quiet", "-q"} <= options


def test_checked_files_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("base: m\nrotations: r\n")
    bad.write_text("rotations: r\n")
    assert run_main(["config", "check", "--json", str(good), str(bad)]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out) == [
        {"file": str(good), "valid": True, "error": None},
        {"file": str(bad), "valid": False, "error": f"{bad}: key base is missing."},
    ]
    assert err.startswith("✗ ")


def test_a_quiet_doctor_tells_what_is_missing_alone(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_main(["doctor", str(llama), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("so8tqc.llama.vendor.vendor_directory", lambda: tmp_path / "empty")
    assert run_main(["doctor", "-q", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert "converter" in {finding["name"] for finding in findings}
    assert not any(finding["ok"] for finding in findings)


def on_a_terminal(*arguments: str, **environment: str) -> str:
    """What a command prints on a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    env = plain | {"TERM": "xterm-256color", "COLUMNS": "80"} | environment
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=theirs, stderr=theirs, stdin=theirs, env=env
    ) as process:
        os.close(theirs)
        said = b""
        while select.select([ours], [], [], 60)[0]:
            try:
                part = os.read(ours, 4096)
            except OSError:  # how Linux says that the other side is closed
                break
            if not part:
                break
            said += part
        process.wait(60)
    os.close(ours)
    return said.decode("utf-8", "replace")


@pytest.mark.parametrize(
    "arguments", [("doctor",), ("bake", "gone", "gone", "--out", "/dev/null/x")]
)
def test_colour_is_for_terminals_that_want_it(arguments: tuple[str, ...]) -> None:
    assert _COLOUR.search(on_a_terminal(*arguments))
    assert not _COLOUR.search(on_a_terminal(*arguments, "--no-color"))
    assert not _COLOUR.search(on_a_terminal(*arguments, NO_COLOR="1"))
    piped = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert "\x1b" not in piped.stdout + piped.stderr


def test_a_pipe_hears_of_a_task_that_counts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "PIPE_INTERVAL_SECONDS", 0.1)
    with terminal_progress(quiet=False) as progress, progress.task("thinking", total=4):
        deadline = time.monotonic() + 30
        heard = ""
        while heard.count("thinking · 0% · ") < 2 and time.monotonic() < deadline:
            heard += capsys.readouterr().err
            select.select([], [], [], 0.05)
    assert heard.count("thinking · 0% · ") >= 2
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"thinking: \d+\.\d s", lines[-1])


def _heed_interrupts() -> None:
    """Jobs that a shell put into the background ignore SIGINT, and so would what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.llama
@pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first")
@pytest.mark.parametrize("moment", ["converting to GGUF", "comparing logits"])
def test_ctrl_c_leaves_a_run_that_goes_on_where_it_stopped(
    llama: Path,
    make_gates: Callable[..., Path],
    texts_file: Path,
    long_texts: Path,
    tmp_path: Path,
    moment: str,
) -> None:
    config, out = tmp_path / "run.yaml", tmp_path / "out"
    (tmp_path / "loose.yaml").write_text(
        "loose:\n  models: {kl.mean: {target: 1.0e-6}}\n"
        "  gguf: {default: {kl.mean: {limit: 0.5}}}\n"
    )
    config.write_text(
        f"base: {llama}\nrotations: {make_gates(llama)}\nout: {out}\ndata: [{texts_file}]\n"
        f"long_data: [{long_texts}]\nquantize: {{types: [Q5_0], pure: true}}\n"
        f"qc: {{max_tokens: 48, resamples: 200, profile: {tmp_path / 'loose.yaml'}}}\n"
        "calibrate: {allow_small: true, resamples: 200, png: false}\nchoose: {repeats: 1}\n"
        "longtext: {min_tokens: 192, max_new_tokens: 0, png: false, resamples: 200}\n"
    )
    done = {"bake"}
    if moment == "comparing logits":
        done |= {"export", "quantize", "calibrate"}
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [*COMMAND, "run", str(config)], start_new_session=True, preexec_fn=_heed_interrupts, **pipes
    ) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith(moment):
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it, too
                break
        said += process.stderr.readlines()
        process.wait(120)
    text = "".join(said)
    assert process.returncode == 130, text
    assert "Interrupted; run the same command again" in text
    assert "Traceback" not in text
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert set(manifest["stages"]) == done
    assert "WARNING interrupted" in (out / "so8tqc.log").read_text(encoding="utf-8")
    for partial in out.rglob("*so8tqc-partial"):
        raise AssertionError(f"{partial} was left")
    again = subprocess.run(
        [*COMMAND, "run", str(config), "--json", "--quiet"], check=False, **pipes
    )
    assert again.returncode == 0, again.stderr
    stages = json.loads(again.stdout)["metrics"]["stages"]
    assert {name for name, stage in stages.items() if stage["reused"]} == done
