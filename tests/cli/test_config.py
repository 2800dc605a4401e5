"""`so8tqc config check` and `show`: what they print, and their exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from so8tqc.cli.main import run as run_main

CONFIGS = Path(__file__).parents[2] / "configs"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_check_tells_every_file_and_every_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write(tmp_path / "a.yaml", "base: m\nrotations: r\nqc:\n  sed: 1\n")
    second = write(tmp_path / "b.yaml", "base: m\n")
    assert run_main(["config", "check", str(first), str(CONFIGS / "demo.yaml"), str(second)]) == 2
    out, err = capsys.readouterr()
    assert out == f"✓ {CONFIGS / 'demo.yaml'}\n"
    assert f"✗ {first}:4: unknown key qc.sed. Did you mean seed?" in err
    assert f"✗ {second}: key rotations is missing" in err


def test_check_is_silent_when_asked_and_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["config", "check", "--quiet", str(CONFIGS / "minimal.yaml")]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_commands_file_needs_no_paths_but_has_its_rules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write(tmp_path / "qc.yaml", "ctx: 512\nstride: 128\n")
    assert run_main(["config", "check", "--stage", "qc", str(good)]) == 0
    bad = write(tmp_path / "bad.yaml", "stride: 128\n")
    assert run_main(["config", "check", "--stage", "qc", str(bad)]) == 2
    assert "stride needs a longer ctx" in capsys.readouterr().err
    assert run_main(["config", "check", "--stage", "bkae", str(good)]) == 2
    assert "bkae reads no config file" in capsys.readouterr().err


def test_check_leaves_the_environment_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SO8TQC_ROTATIONS", "r")
    assert run_main(["config", "check", str(write(tmp_path / "a.yaml", "base: m\n"))]) == 2
