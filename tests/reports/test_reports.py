"""Reports are pure functions of records; HTML is self-contained and draws its plots."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from so8tqc.config import STAGES
from so8tqc.errors import InputError
from so8tqc.languages import Language
from so8tqc.record_files import read_record, write_record
from so8tqc.records import Check, Diagnosis, Record, RunInfo, Verdict, judge, overall, skipped
from so8tqc.reports import format as fmt
from so8tqc.reports.junit import junit_xml
from so8tqc.reports.language import say, spoken
from so8tqc.reports.summary import summarise_run
from so8tqc.services.report import report, write_stage_reports
from so8tqc.services.run.demo import quick_demo_config

STATISTICS = {
    "texts": 25, "tokens": 6375, "kl_mean": 1e-5,
    "kl_percentiles": {"99": 1e-4}, "kl_max": 1e-3, "top1": 0.998,
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
        judge(
            "kl.mean",
            0.2,
            2e-5,
            detail="Too far.",
            subject="baked",
            ci95=(0.1, 0.3),
            target=1e-6,
            noise_floor=1e-5,
        ),
        judge("effect.kl", 0.2, 1e-4, comparison=">=", detail="The gate works."),
        skipped("calibration.ece", "no <reason> | given"),
        metrics={"candidates": {"baked": STATISTICS}},
        diagnosis=(
            Diagnosis(
                code="transposed",
                layers=(0, 1, 2, 5),
                text="Rᵀ was folded.",
                remedy="Bake again with --convention row.",
            ),
        ),
    )
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
    assert result.metrics["stages"]["qc"]["failed"] == 1
    for text in (markdown, page):
        assert "4 checks in 2 stages: 2 passed, 1 failed, 1 skipped." in text
        # the first screen: value, interval, floor, the effect for scale, top tokens
        assert "95 % interval 0.1 … 0.3" in text
        assert "rounding alone costs 1e-05" in text
        assert "the gates change 0.2 nats" in text
        assert "absolute target 1e-06 not met" in text
        assert "25 texts, 6,375 tokens" in text
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
    assert page.count("Plotly.newPlot(") >= 2


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


def test_a_stage_page_links_to_what_lies_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "any name"
    folder.mkdir()
    for name in ("case_entropy.html", "a#b_entropy.html"):
        (folder / name).write_text("")
    case = {"tokens": 2048, "generation": {"candidate": {"repeated": 0.25}}}
    write_stage_reports(record("longtext", metrics={"cases": {"proof": case}}), folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert 'href="case_entropy.html"' in page
    assert 'href="a%23b_entropy.html"' in page
    assert 'href="report.html"' not in page
    assert "1 long text, 2,048 tokens" in page
    assert "Nothing was checked." in page


@pytest.mark.parametrize("stage", [*STAGES[:-1], "attest"])
def test_a_record_that_measured_nothing_is_shown_all_the_same(tmp_path: Path, stage: str) -> None:
    write_stage_reports(record(stage, skipped("x.y", "no text")), tmp_path)
    assert "1 check: 1 skipped." in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_stage_without_tables_of_its_own_is_shown_generically(run_directory: Path) -> None:
    metrics = {"links": 4, "compared": {"bake": {"same": True, "bytes": 7}, "export": {"bytes": 8}}}
    (run_directory / "attest").mkdir()
    write_record(run_directory / "attest" / "record.json", record("attest", metrics=metrics))
    report(run_directory)
    markdown = (run_directory / "report" / "report.md").read_text(encoding="utf-8")
    assert "| links | 4 |" in markdown
    assert "| bake | True | 7 |" in markdown
    assert "| export |  | 8 |" in markdown


def test_names_from_outside_cannot_break_out(tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script>|`\x1b[31m\x00.gguf"
    (tmp_path / "qc").mkdir()
    qc = record(
        "qc",
        judge("kl.mean", float("nan"), 1.0, subject=hostile, detail=hostile),
        metrics={"candidates": {hostile: STATISTICS}},
        notices=(hostile,),
    )
    write_record(tmp_path / "qc" / "record.json", qc)
    report(tmp_path)
    out = tmp_path / "report"
    assert "<script>alert" not in (out / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in (out / "report.md").read_text(encoding="utf-8")
    case = ET.parse(out / "junit.xml").find(".//testcase")
    assert case is not None
    assert case.get("name", "").endswith("|`\ufffd[31m\ufffd.gguf]")


def test_the_worst_stage_decides(tmp_path: Path) -> None:
    good = record("bake", judge("x.y", 0.0, 1.0, detail=""))
    silent = record("longtext", skipped("x.y", "no text"))
    bad = good.model_copy(update={"kind": "qc", "verdict": Verdict.FAIL})
    assert summarise_run("r", {"bake": good, "longtext": silent})["verdict"] == "pass"
    assert summarise_run("r", {"longtext": silent})["verdict"] == "skip"
    assert summarise_run("r", {"bake": good, "qc": bad})["verdict"] == "fail"


@pytest.mark.parametrize("language", Language)
def test_what_a_run_was_noted_for_stands_on_the_first_screen(
    run_directory: Path, language: Language
) -> None:
    path = run_directory / "record.json"
    noted = quick_demo_config(run_directory)
    write_record(path, record("run", config=noted.model_dump(mode="json")))
    report(run_directory, language=language)
    with spoken(language):
        expected = say(noted.note)
    assert (expected == noted.note) == (language is Language.ENGLISH)
    for name in ("report.html", "report.md"):
        page = (run_directory / "report" / name).read_text(encoding="utf-8")
        assert expected in page
        assert "--full" in page


def test_an_empty_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no stage has left a record"):
        report(tmp_path)


def test_a_file_that_failed_stands_among_the_three_numbers(tmp_path: Path) -> None:
    """Even if its KL passed, and even if another passing file is further away."""
    qc = record(
        "qc",
        judge("kl.mean", 1e-5, 2e-5, detail="", subject="baked", noise_floor=1e-5),
        judge("kl.top1", 0.999, 0.99, comparison=">=", detail="", subject="baked"),
        judge("kl.mean", 0.5, 1.0, detail="", subject="far.gguf"),
        judge("kl.mean", 0.1, 0.2, detail="", subject="bad.gguf"),
        judge("kl.top1", 0.6, 0.7, comparison=">=", detail="", subject="bad.gguf"),
    )
    cards = summarise_run("r", {"qc": qc})["headline"]
    assert [card["label"] for card in cards][:2] == ["Mean KL, baked", "Mean KL, bad.gguf"]
    assert [card["verdict"] for card in cards] == ["pass", "fail", "pass"]
    assert "failed: kl.top1" in cards[1]["note"]
    passed = qc.model_copy(update={"checks": qc.checks[:4]})
    cards = summarise_run("r", {"qc": passed})["headline"]
    assert cards[1]["label"] == "Mean KL, far.gguf"
    assert "the furthest of 2 files" in cards[1]["note"]


def test_numbers_for_people() -> None:
    values = (None, 3.0, 0.123456, 1.5e-9, float("nan"))
    assert [fmt.number(v) for v in values] == ["–", "3", "0.1235", "1.5e-09", "NaN"]
    assert [fmt.size(v) for v in (7, 1500, 2.5e6, 3e9)] == ["7 bytes", "1.5 kB", "2.5 MB", "3.0 GB"]
    assert [fmt.counted(n, "text") for n in (1, 6375)] == ["1 text", "6,375 texts"]
    assert fmt.ranges((0, 1, 2, 5)) == "0–2, 5"
