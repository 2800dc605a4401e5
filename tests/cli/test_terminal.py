"""What people see: tables within 80 columns, progress that survives a pipe."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from so8tqc.cli import progress as terminal
from so8tqc.cli.progress import scaled, terminal_progress
from so8tqc.cli.show import show
from so8tqc.records import Check, Record, RunInfo, judge, overall, skipped


def record(kind: str, *checks: Check, **fields: object) -> Record:
    run = RunInfo(started=datetime(2026, 1, 1, tzinfo=UTC), seconds=1.0)
    return Record(kind=kind, verdict=overall(checks), checks=checks, run=run, **fields)  # type: ignore[arg-type]


def test_checks_fit_80_columns_with_all_that_matters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "a-model-with-a-long-name-in-its-file-Q5_K_M.gguf"
    show(
        record(
            "qc",
            judge("rotation.orthogonality", 5.795e-16, 1e-3, target=1e-3, detail="Drift."),
            judge(
                "kl.mean",
                1.539e-5,
                3.079e-5,
                ci95=(1.2281e-5, 1.8389e-5),
                target=1e-6,
                subject="baked",
                detail="Near.",
            ),
            judge("kl.mean", 0.1217, 0.08, ci95=(0.105, 0.138), subject=name, detail="Too [far]."),
            skipped("calibration.ece", "no text", subject=name),
            skipped("calibration.brier", "no text", subject=name),
        )
    )
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= 80
    kl = next(line for line in out.splitlines() if "1.539e-05" in line)
    cells = ["pass", "kl.mean", "1.539e-05", "≤ 3.079e-05", "1.23e-05 … 1.84e-05", "1e-06 ✗"]
    assert " ".join(kl.split()) == " ".join(cells)
    assert f"qc, {name}" in out
    joined = " ".join(out.split())
    assert f"FAIL kl.mean of {name}: Too [far]." in joined
    assert f"skip calibration.ece, calibration.brier of {name}: no text" in joined
    assert out.rstrip().endswith("qc: FAIL")


def test_columns_that_nothing_fills_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    show(record("export", judge("export.missing", 0.0, 0.0, detail="")))
    out = capsys.readouterr().out
    assert "limit" in out
    assert "interval" not in out
    assert "target" not in out


def test_a_calibration_says_its_temperature_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    measures = ("nll", "ece", "adaptive_ece", "classwise_ece", "brier", "sharpness")
    metrics = {
        "fitted": 1.0864,
        "ci95": [1.0711, 1.1012],
        "significant": True,
        "before": dict.fromkeys(measures, 13.085),
        "at_fitted": dict.fromkeys(measures, 13.0684),
        "change": {m: {"difference": -0.0166, "ci95": [-0.0231, -0.0094]} for m in measures},
        "reference": dict.fromkeys(measures, 2.9),
    }
    show(record("calibrate", metrics=metrics))
    out = capsys.readouterr().out
    assert "T = 1.086, 95 % interval 1.071 … 1.101, used" in out
    shown = next(line for line in out.splitlines() if line.startswith("sharpness"))
    assert shown.split()[-6:] == ["13.0850", "13.0684", "-0.0166", "-0.0231", "…", "-0.0094"]

    show(record("calibrate", metrics={**metrics, "ci95": None, "significant": False}))
    assert "T = 1.086, not used" in capsys.readouterr().out


def test_a_run_shows_its_stages_and_only_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "verdict": "fail",
        "passed": 1,
        "failed": 1,
        "skipped": 0,
        "seconds": 2.5,
        "reused": False,
    }
    checks = (judge("a.good", 0.0, 1.0, detail=""), judge("a.bad", 2.0, 1.0, detail="Why."))
    show(record("report", *checks, metrics={"stages": {"qc": row}}))
    out = capsys.readouterr().out
    assert "qc" in out
    assert "2.5" in out
    assert "a.bad" in out
    assert "a.good" not in out


def test_progress_in_a_pipe_is_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "PIPE_INTERVAL_SECONDS", 0.0)
    with terminal_progress(quiet=False) as progress:
        with progress.task("folding", total=4, unit="tensors") as task:
            task.advance(1, item="layer 0")
        with progress.task("fetching") as task:
            task.advance(1)
        progress.message("reused")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == "folding …"
    assert lines[1].startswith("folding · 25%")
    assert lines[1].endswith("tensors/s · layer 0")
    assert lines[4] == "fetching · 0 s"
    assert lines[-1] == "reused"
    assert not set(captured.err) & set("\x1b\r\b")


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal_progress(quiet=True) as progress, progress.task("x") as task:
        task.advance()
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_large_rates_have_a_scale() -> None:
    assert [scaled(v) for v in (12.0, 1234.0, 5.6e6)] == ["12.0", "1.2 k", "5.6 M"]
