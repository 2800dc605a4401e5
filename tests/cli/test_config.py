"""`so8tqc config check` and `show`: what they print, and their exit codes."""

from __future__ import annotations

import json
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
    second = write(tmp_path / "b.yaml", "rotations: r\n")
    assert run_main(["config", "check", str(first), str(CONFIGS / "demo.yaml"), str(second)]) == 2
    out, err = capsys.readouterr()
    assert out == f"✓ {CONFIGS / 'demo.yaml'}\n"
    assert f"✗ {first}:4: unknown key qc.sed. Did you mean seed?" in err
    assert f"✗ {second}: key base is missing" in err


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
    monkeypatch.setenv("SO8TQC_BASE", "m")
    assert run_main(["config", "check", str(write(tmp_path / "a.yaml", "rotations: r\n"))]) == 2


def test_show_names_the_origin_of_every_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(
        tmp_path / "a.yaml",
        "base: m\nout: file\nqc:\n  seed: 1\n  resamples: 300\n  level: files\n"
        "quantize:\n  types: [Q5_K_M]\n",
    )
    monkeypatch.setenv("SO8TQC_QC__RESAMPLES", "400")
    monkeypatch.setenv("SO8TQC_QC__SEED", "2")
    arguments = ["config", "show", str(file), "--set", "qc.seed=3", "--out", "o"]
    assert run_main([*arguments, "--json"]) == 0
    rows = {
        row["key"]: (row["value"], row["origin"]) for row in json.loads(capsys.readouterr().out)
    }
    assert rows["base"] == ("m", f"{file}:1")
    assert rows["rotations"] == (None, "default")
    assert rows["out"] == ("o", "command line")
    assert rows["qc.seed"] == (3, "--set qc.seed=3")
    assert rows["qc.resamples"] == (400, "SO8TQC_QC__RESAMPLES")
    assert rows["qc.level"] == ("files", f"{file}:6")
    assert rows["qc.profile"] == ("default", "default")
    assert rows["quantize.types"] == (["Q5_K_M"], f"{file}:8")
    assert run_main(arguments) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["qc.resamples", "400", "SO8TQC_QC__RESAMPLES"] in lines
    assert len(lines) == len(rows)


def test_show_forgets_what_a_whole_mapping_hides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.yaml", "base: m\nrotations: r\nqc:\n  seed: 1\n  ctx: 64\n")
    assert run_main(["config", "show", str(file), "--set", "qc={seed: 5}", "--json"]) == 0
    rows = {
        row["key"]: (row["value"], row["origin"]) for row in json.loads(capsys.readouterr().out)
    }
    assert rows["qc.seed"] == (5, "--set qc={seed: 5}")
    assert rows["qc.ctx"] == (None, "default")


def test_show_a_command_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["config", "show", "--stage", "qc", "--json"]) == 0
    rows = {
        row["key"]: (row["value"], row["origin"]) for row in json.loads(capsys.readouterr().out)
    }
    assert rows["candidates"] == (None, "not given")
    assert rows["seed"] == (0, "default")


def test_show_refuses_what_run_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["config", "show", "--set", "qc.sed=1"]) == 2
    assert "unknown key qc.sed" in capsys.readouterr().err
    assert run_main(["config", "show", "--stage", "verify", "--out", "o"]) == 2
