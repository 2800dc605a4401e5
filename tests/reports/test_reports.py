"""Reports are pure functions of records; HTML is self-contained and draws its plots."""

from __future__ import annotations

import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from so8tqc.artifacts import read_record, write_record
from so8tqc.errors import InputError
from so8tqc.records import Check, Diagnosis, Record, RunInfo, Verdict, judge, overall, skipped
from so8tqc.reports.junit import junit_xml
from so8tqc.services.report import report, write_stage_reports

CHROME = shutil.which("chromium") or shutil.which("google-chrome")
STATISTICS = {
    "kl_mean": 1e-5, "kl_percentiles": {"99": 1e-4}, "kl_max": 1e-3, "top1": 0.998,
    "ln_ppl_ratio": 1e-4, "dp_rms": 0.001, "max_abs": 0.1, "ece_reference": 0.02,
    "ece_candidate": 0.021, "brier_reference": 0.6, "brier_candidate": 0.6,
    "kl_histogram": {"log10_centres": [-6.0, -5.0, -4.0], "counts": [3.0, 9.0, 2.0]},
}  # fmt: skip


def record(kind: str, *checks: Check, **fields: object) -> Record:
    return Record(
        kind=kind,
        verdict=overall(checks),
        checks=checks,
        versions={"so8tqc": "0.1"},
        run=RunInfo(started=datetime(2026, 1, 1, tzinfo=UTC), seconds=1.5),
        **fields,  # type: ignore[arg-type]
    )


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """Two stages: a bake that passed, a qc that failed with a diagnosis."""
    layers = [{"layer": i, "effect": 0.3, "relative_error": 1e-3} for i in range(3)]
    bake = record(
        "bake",
        judge("algebra.exact", 0.5, 0.5, detail="Exact."),
        metrics={"layers": layers, "orthogonality": [[1e-16, 2e-16]] * 3},
    )
    qc = record(
        "qc",
        judge("kl.mean", 0.2, 2e-5, detail="Too far.", subject="baked", ci95=(0.1, 0.3),
              target=1e-6, noise_floor=1e-5),
        judge("effect.kl", 0.2, 1e-4, comparison=">=", detail="The gate works."),
        skipped("calibration.ece", "no <reason> | given"),
        metrics={"candidates": {"baked": STATISTICS}},
        diagnosis=(
            Diagnosis(code="transposed", layers=(0, 1, 2, 5), text="Rᵀ was folded.",
                      remedy="Bake again with --convention row."),
        ),
    )  # fmt: skip
    for name, value in (("bake", bake), ("qc", qc)):
        (tmp_path / name).mkdir()
        write_record(tmp_path / name / "record.json", value)
    return tmp_path


def test_records_survive_the_disk(run_directory: Path) -> None:
    again = read_record(run_directory / "qc" / "record.json")
    assert again.verdict is Verdict.FAIL
    assert again.check("kl.mean", "baked").ci95 == (0.1, 0.3)
    with pytest.raises(KeyError):
        again.check("kl.mean", "other")


def test_a_nan_never_passes() -> None:
    assert judge("x.y", float("nan"), 1.0, detail="").verdict is Verdict.FAIL
    assert judge("x.y", float("nan"), 1.0, comparison=">=", detail="").verdict is Verdict.FAIL


def test_the_report_says_what_failed_and_what_to_do(run_directory: Path) -> None:
    result = report(run_directory)
    assert result.verdict is Verdict.FAIL
    markdown = (run_directory / "report" / "report.md").read_text(encoding="utf-8")
    page = (run_directory / "report" / "report.html").read_text(encoding="utf-8")
    for text in (markdown, page):
        assert "Bake again with --convention row." in text
        assert "transposed" in text
        assert "0–2, 5" in text
        assert "kl.mean" in text
    assert "no &lt;reason> \\| given" in markdown
    assert "no &lt;reason&gt; | given" in page


def test_the_page_loads_nothing_from_the_network(run_directory: Path) -> None:
    report(run_directory)
    page = (run_directory / "report" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=[\"']?(https?:)?//", page)
    assert len(page) < 6_000_000
    assert page.count("Plotly.newPlot(") >= 3


def test_junit_has_a_case_for_each_check(run_directory: Path) -> None:
    records = [read_record(run_directory / n / "record.json") for n in ("bake", "qc")]
    root = ET.fromstring(junit_xml(records))
    assert [s.get("tests") for s in root] == ["1", "3"]
    assert [s.get("failures") for s in root] == ["0", "1"]
    failure = root.find(".//failure")
    assert failure is not None
    assert failure.get("message") == "value 0.2, must be <= 2e-05"
    assert root.find(".//skipped") is not None


def test_one_stage_alone(run_directory: Path) -> None:
    write_stage_reports(read_record(run_directory / "qc" / "record.json"), run_directory / "qc")
    for name in ("report.md", "report.html", "junit.xml"):
        assert (run_directory / "qc" / name).stat().st_size > 500


def test_an_empty_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no stage has left a record"):
        report(tmp_path)


@pytest.mark.png
@pytest.mark.skipif(CHROME is None, reason="no Chrome")
def test_every_plot_is_drawn_in_a_browser(run_directory: Path, tmp_path: Path) -> None:
    report(run_directory)
    page = run_directory / "report" / "report.html"
    assert CHROME is not None
    done = subprocess.run(
        [
            CHROME, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path / 'chrome'}", "--enable-logging=stderr",
            "--virtual-time-budget=5000", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    expected = page.read_text(encoding="utf-8").count("Plotly.newPlot(")
    assert done.stdout.count('class="main-svg"') >= expected > 0
