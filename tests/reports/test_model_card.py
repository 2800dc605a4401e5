"""The section for a README: what it says is what the records say, and nothing else."""

from __future__ import annotations

import hashlib
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from so8tqc.cli.app import app
from so8tqc.disk.digests import file_ref
from so8tqc.errors import InputError
from so8tqc.record_files import write_record
from so8tqc.records import Check, FileRef, Record, RunInfo, judge, overall
from so8tqc.reports.model_card import model_card
from so8tqc.services.report import write_model_card

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def record(kind: str, *checks: Check, **fields: object) -> Record:
    return Record(
        kind=kind,
        verdict=overall(checks),
        checks=checks,
        versions={"so8tqc": "0.1.0"},
        run=RunInfo(started=datetime(2026, 1, 1, tzinfo=UTC), seconds=1.0),
        **fields,  # type: ignore[arg-type]
    )


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """Two files, of which one is calibrated and one failed."""
    out = tmp_path / "run"
    files = {}
    for folder, name in (
        ("export", "m-F16.gguf"),
        ("quantize", "m-Q4_K_M.gguf"),
        ("calibrate", "m-Q4_K_M-calibrated.gguf"),
    ):
        path = out / folder / name
        path.parent.mkdir(parents=True)
        path.write_bytes(name.encode() * 1000)
        files[name] = file_ref(path)
    f16, q4, applied = files.values()
    base = FileRef(path="/home/me/secret/base", sha256="b" * 64, bytes=9, source=f"org/m@{COMMIT}")
    gates = FileRef(path="/home/me/secret/gates.safetensors", sha256="c" * 64, bytes=9)
    statistics = {"texts": 25, "tokens": 6375, "top1": 0.9}
    records = {
        "export": record("export", judge("export.tensors", 0, 0, detail=""), outputs={"gguf": f16}),
        "quantize": record(
            "quantize", judge("quantize.types", 0, 0, detail=""), outputs={"Q4_K_M": q4}
        ),
        "calibrate": record(
            "calibrate",
            judge("calibration.nll", -0.1, 0, detail=""),
            inputs={"gguf": q4},
            outputs={"calibrated": applied},
            metrics={"temperature": 1.0871, "applied": {"how": "norm"}},
        ),
        "qc": record(
            "qc",
            judge("kl.mean", 2e-5, 1e-4, detail="", subject="m-F16.gguf", ci95=(1e-5, 3e-5)),
            judge("kl.mean", 0.125, 0.1, detail="", subject="m-Q4_K_M.gguf", ci95=(0.11, 0.14)),
            inputs={"reference": base, "rotations": gates},
            metrics={
                "candidates": {
                    "m-F16.gguf": {**statistics, "kl_mean": 2e-5, "top1": 0.999},
                    "m-Q4_K_M.gguf": {**statistics, "kl_mean": 0.125},
                }
            },
        ),
    }
    for stage, value in records.items():
        write_record(out / stage / "record.json", value)
    return out


def test_each_file_has_its_numbers(run_directory: Path) -> None:
    text = write_model_card(run_directory).read_text(encoding="utf-8")
    rows = {
        cells[0]: cells[1:]
        for line in text.splitlines()
        if line.startswith("| m-")
        for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
    }
    digests = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in run_directory.glob("*/*.gguf")
    }
    assert rows == {
        "m-F16.gguf": [
            "10.0 kB",
            "2e-05",
            "1e-05 … 3e-05",
            "99.90 %",
            "–",
            "pass",
            f"`{digests['m-F16.gguf']}`",
        ],
        "m-Q4_K_M.gguf": [
            "13.0 kB",
            "0.125",
            "0.11 … 0.14",
            "90.00 %",
            "1.087",
            "fail",
            f"`{digests['m-Q4_K_M.gguf']}`",
        ],
        "m-Q4_K_M-calibrated.gguf": [
            "24.0 kB",
            "–",
            "–",
            "–",
            "1.087, in the file",
            "–",
            f"`{digests['m-Q4_K_M-calibrated.gguf']}`",
        ],
    }
    assert "Verdict of the run: **fail** (kl.mean failed)." in text
    assert "25 texts, 6,375 scored tokens" in text
    assert f"Base model: org/m@{COMMIT} (sha256 bbbbbbbbbbbbbbbb…)." in text
    assert "gates.safetensors (sha256 cccccccccccccccc…)" in text
    assert "secret" not in text
    assert not text.startswith("---")
    assert "\n\n\n" not in text


def test_the_digests_can_be_checked(run_directory: Path, tmp_path: Path) -> None:
    text = write_model_card(run_directory).read_text(encoding="utf-8")
    script = re.search(r"```bash\n(sha256sum .*?)```", text, re.DOTALL)
    assert script is not None
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for path in run_directory.glob("*/*.gguf"):
        (folder / path.name).write_bytes(path.read_bytes())

    def check() -> int:
        return subprocess.run(["bash", "-c", script[1]], cwd=folder, check=False).returncode

    assert check() == 0
    (folder / "m-F16.gguf").write_bytes(b"another")
    assert check() != 0


def test_on_the_command_line(run_directory: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(run_directory), "--model-card"])
    assert result.exit_code == 1  # the run's verdict
    assert "model-card.md" in result.output
    assert (run_directory / "report" / "model-card.md").is_file()
    assert (run_directory / "report" / "report.html").is_file()


def test_names_cannot_break_out_of_the_table() -> None:
    evil = FileRef(path="a|b<script>.gguf", sha256="d" * 64, bytes=1)
    text = model_card("x", {"export": record("export", outputs={"gguf": evil})})
    row = next(line for line in text.splitlines() if line.startswith("| a"))
    assert row.startswith(r"| a\|b&lt;script>.gguf |")


def test_a_run_without_files_has_no_card(tmp_path: Path) -> None:
    write_record(tmp_path / "bake" / "record.json", record("bake"))
    with pytest.raises(InputError, match="no file for a model card"):
        write_model_card(tmp_path)
