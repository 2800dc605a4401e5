"""Reports in other languages: complete, true to their placeholders, and only the frame."""

from __future__ import annotations

import ast
import json
import re
import shutil
import string
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from jinja2 import Environment, nodes
from rich.cells import cell_len

import so8tqc
from so8tqc.check_guide import BEFORE_COMMANDS, DIAGNOSES, EXIT_CODES, FILE_TYPE, GUIDE, PROFILES
from so8tqc.cli.main import run as run_main
from so8tqc.config import RunConfig
from so8tqc.languages import Language
from so8tqc.record_files import read_record, write_record
from so8tqc.records import Diagnosis, Record, RunInfo, Verdict, judge, overall, skipped
from so8tqc.reports.diagnoses import CODES, finding
from so8tqc.reports.kinds.bake import layer_table
from so8tqc.reports.kinds.qc import worst_token_tables
from so8tqc.reports.language import catalogue, current, say, spoken
from so8tqc.reports.sections import stage_tables
from so8tqc.services.qc import misread
from so8tqc.services.report import read_stages, report
from so8tqc.services.run.pipeline import run as run_pipeline
from so8tqc.services.weights import diagnose

PACKAGE = Path(so8tqc.__file__).parent
FOLDER = PACKAGE / "reports" / "languages"
OTHERS = [language for language in Language if language is not Language.ENGLISH]


def said_in_code() -> set[str]:
    """Every literal given to say() or message(), in modules and templates."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                first = node.args[0] if node.args else None
                if node.func.id in ("say", "message") and isinstance(first, ast.Constant):
                    found.add(str(first.value))
    for path in (PACKAGE / "reports" / "templates").glob("*.j2"):
        for call in Environment().parse(path.read_text(encoding="utf-8")).find_all(nodes.Call):
            if isinstance(call.node, nodes.Name) and call.node.name == "say":
                found |= {call.args[0].value} if isinstance(call.args[0], nodes.Const) else set()
    return found


def said_of_checks_and_diagnoses() -> set[str]:
    """The guide, and what ``services.weights.diagnose`` adds to it."""
    tables = (GUIDE, DIAGNOSES, PROFILES, EXIT_CODES)
    guide = {text for table in tables for entry in table.values() for text in entry}
    return guide | {
        FILE_TYPE,
        *BEFORE_COMMANDS,
        misread.NOT_THESE,
        diagnose._TOO_SMALL,
        diagnose.EXPORT,
        diagnose._FINER,
        diagnose._TRAIN,
    }


def test_every_language_has_a_file_and_every_file_a_language() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == {language.value for language in OTHERS}


@pytest.mark.parametrize("language", OTHERS)
def test_no_message_is_missing_and_none_is_unused(language: Language) -> None:
    wanted, there = said_in_code() | said_of_checks_and_diagnoses(), set(catalogue(language))
    assert len(wanted) > 400
    assert wanted - there == set(), "missing"
    assert there - wanted == set(), "unused"


@pytest.mark.parametrize("language", OTHERS)
def test_no_message_is_there_twice(language: Language) -> None:
    """YAML lets the last one win, silently."""
    tree = yaml.compose((FOLDER / f"{language}.yaml").read_text(encoding="utf-8"))
    keys = [key.value for key, _ in tree.value]
    assert len(keys) == len(set(keys))


def holes(text: str) -> list[str]:
    """Placeholders with their formats, plotly's, tags, and commands to be typed."""
    if "%{" in text:
        return sorted(re.findall(r"%\{[^}]*\}|<[^>]+>", text))
    fields = [f"{name}:{spec}" for _, name, spec, _ in string.Formatter().parse(text) if name]
    return sorted([*fields, *re.findall(r"--[a-z0-9-]+|so8tqc [a-z]+ [A-Z]+|⟦|⟧", text)])


@pytest.mark.parametrize("language", OTHERS)
def test_placeholders_and_commands_agree(language: Language) -> None:
    for english, other in catalogue(language).items():
        assert other.strip() or not english.strip(), english
        assert holes(other) == holes(english)


def test_titles_differ() -> None:
    titles = [guide.title for guide in GUIDE.values()]
    assert len(set(titles)) == len(titles)


def test_every_code_is_a_message() -> None:
    assert set(CODES) == set(DIAGNOSES)


def test_a_language_holds_within_its_block_and_english_is_what_is_missing() -> None:
    with spoken(Language.JAPANESE):
        assert current() is Language.JAPANESE
        assert say("pass") == "合格"
        assert say("{count} files", count=3) == "3 ファイル"
        assert say("never translated {x}", x=1) == "never translated 1"
    assert (current(), say("pass")) == (Language.ENGLISH, "pass")


def record(kind: str, **fields: object) -> Record:
    checks = (
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
        skipped("calibration.ece", "no text"),
    )
    run = RunInfo(started=datetime(2026, 1, 1, tzinfo=UTC), seconds=1.5)
    return Record(kind=kind, verdict=overall(checks), checks=checks, run=run, **fields)  # type: ignore[arg-type]


TRANSPOSED = Diagnosis(
    code="transposed",
    layers=(0, 1),
    text="The transposed rotation was folded: Rᵀ instead of R (2 of 2 tensors of baked).",
    remedy=DIAGNOSES["transposed"].remedy,
)


def test_a_diagnosis_keeps_what_no_sentence_is_known_for() -> None:
    with spoken(Language.JAPANESE):
        assert finding(TRANSPOSED) == (
            "転置した回転が折り込まれています：Rᵀ instead of R（baked のテンソル 2 個中 2 個）。"
        )
    assert finding(TRANSPOSED) == TRANSPOSED.text


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    (tmp_path / "qc").mkdir()
    write_record(tmp_path / "qc" / "record.json", record("qc", diagnosis=(TRANSPOSED,)))
    return tmp_path


def test_people_read_japanese_and_machines_read_the_same_english(
    run_directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = run_directory / "report"
    report(run_directory)
    before = {name: (out / name).read_text() for name in ("report.json", "junit.xml")}
    capsys.readouterr()
    assert run_main(["report", str(run_directory), "--lang", "ja"]) == 1
    for name, text in before.items():
        assert (out / name).read_text() == text
    page = (out / "report.html").read_text(encoding="utf-8")
    markdown = (out / "report.md").read_text(encoding="utf-8")
    assert '<html lang="ja">' in page
    for text in (page, markdown):
        assert "検査 3 件：合格 1、不合格 1、未判定 1。" in text
        assert "95 % 信頼区間 0.1 … 0.3" in text
        assert "転置した回転が折り込まれています：Rᵀ instead of R（baked" in text
        assert "平均 KL ダイバージェンス" in text
    shown = capsys.readouterr().out
    assert "転置 (transposed)" in shown
    assert shown.rstrip().endswith("report: 不合格")
    assert max(cell_len(line) for line in shown.splitlines() if "/" not in line) <= 80


def test_without_a_flag_the_language_is_the_runs(run_directory: Path) -> None:
    config = {"report": {"language": "ja"}}
    write_record(run_directory / "record.json", record("run", config=config))
    assert report(run_directory).metrics["language"] == "ja"
    assert report(run_directory, language=Language.ENGLISH).metrics["language"] == "en"
    write_record(
        run_directory / "record.json", record("run", config={"report": {"language": "xx"}})
    )
    assert report(run_directory).metrics["language"] == "en"


def test_a_table_on_a_terminal_stays_straight_with_wide_letters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Japanese letters are two cells wide: each cell must end in the same column of the screen."""
    from so8tqc.cli.show import show

    monkeypatch.setenv("COLUMNS", "80")
    rows = {
        name: {
            "verdict": verdict,
            "passed": n,
            "failed": 1,
            "skipped": 0,
            "seconds": s,
            "reused": False,
        }
        for name, verdict, n, s in (("bake", "pass", 7, 1.5), ("calibrate", "fail", 120, 10.25))
    }
    with spoken(Language.JAPANESE):
        show(record("report", metrics={"stages": rows}))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(cell_len, lines)) <= 80
    start = next(i for i, line in enumerate(lines) if line.startswith("工程") and "判定" in line)
    table = lines[start : start + 3]
    assert len({cell_len(line.rstrip()) for line in table}) == 1
    heads = [m.start() for m in re.finditer(r"判定|合格|不合格|pass", table[0])]
    assert cell_len(table[0][: heads[0]]) == cell_len(table[1][: table[1].index("合格")])


@pytest.mark.llama
@pytest.mark.parametrize("language", OTHERS)
def test_tables_keep_their_columns(real_run: Path, language: Language) -> None:
    """Two columns that one word names would become one."""
    for stage, stored in read_stages(real_run).items():
        shapes = []
        for spoken_language in (Language.ENGLISH, language):
            with spoken(spoken_language):
                tables = [*stage_tables(stage, stored), *worst_token_tables(stored)]
                tables += [table for table in [layer_table(stored)] if table]
            shapes.append([(len(t.header), [len(row) for row in t.rows]) for t in tables])
            if stage != "calibrate":  # "fitted" follows each of three measures there
                assert all(len(set(t.header)) == len(t.header) for t in tables)
        assert shapes[0] == shapes[1], stage


@pytest.mark.llama
def test_a_run_that_is_reused_writes_its_pages_in_the_new_language(real_run: Path) -> None:
    config = read_record(real_run / "record.json").config
    pages = [real_run / stage / "report.html" for stage in ("bake", "qc", "longtext", "report")]
    for language in (Language.JAPANESE, Language.ENGLISH):
        options = RunConfig.model_validate({**config, "report": {"language": language}})
        stages = run_pipeline(options).metrics["stages"]
        assert isinstance(stages, dict)
        assert all(row["reused"] for row in stages.values())  # type: ignore[index, call-overload]
        for page in pages:
            assert f'<html lang="{language}">' in page.read_text(encoding="utf-8")


ENGLISH_WORDS = re.compile(r"[a-z]{3,}(?: [a-z]{2,})+")


@pytest.mark.llama
@pytest.mark.parametrize("language", OTHERS)
def test_the_frame_of_a_real_page_has_no_english_sentence_left(
    real_run: Path, tmp_path: Path, language: Language
) -> None:
    """Headings, labels, captions, plots; test_measured.py has what services write."""
    copied = tmp_path / "run"
    shutil.copytree(real_run, copied, ignore=shutil.ignore_patterns("*.gguf", "baked_model"))
    report(copied, language=language)
    page = (copied / "report" / "report.html").read_text(encoding="utf-8")
    body = page[page.index("<body>") :]
    parts = r"h[1-3]|th|dt|dd|li|summary|p class=\"(?:soft|kicker)\"|span class=\"(?:label|soft)\""
    frame = re.findall(rf"<(?:{parts})[^>]*>(.*?)</", body)
    frame += re.findall(r'"(?:text|name)":"([^"]*)"', body)
    assert len(frame) > 300
    typed = re.compile(r'<code class="command">.*|<[^>]+>|/\S+')
    left = [text for text in frame if ENGLISH_WORDS.search(typed.sub("", text))]
    assert left == []
    stored = read_record(copied / "qc" / "record.json")
    assert stored.verdict is Verdict.FAIL
    assert json.loads((copied / "report" / "report.json").read_text())["verdict"] == "fail"
