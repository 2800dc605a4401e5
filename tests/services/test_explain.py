"""so8tqc explain: every id has its words, limits are those that judge, a typo finds its id."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from rich.cells import cell_len

from so8tqc.check_guide import DIAGNOSES, EXIT_CODES, GUIDE, PROFILES
from so8tqc.cli.main import run as run_main
from so8tqc.cli.show import show
from so8tqc.errors import ConfigError, ExitCode
from so8tqc.languages import Language
from so8tqc.record_files import write_record
from so8tqc.records import Check, Diagnosis, Record, RunInfo, judge, overall
from so8tqc.reports.language import catalogue, spoken
from so8tqc.services.explain import Kind, everything, explain, nearest
from so8tqc.services.qc.profiles import BUILTIN_PROFILES
from so8tqc.services.report import report

PROFILES_FILE = yaml.safe_load(BUILTIN_PROFILES.read_text(encoding="utf-8"))


def ids() -> Iterator[str]:
    """What a user may meet: in records, in profiles, in a shell."""
    yield from GUIDE
    yield from DIAGNOSES
    yield from PROFILES_FILE
    yield from (name for name in PROFILES_FILE["default"]["gguf"] if name != "default")
    yield from (str(int(code)) for code in ExitCode)


def typos(name: str) -> Iterator[str]:
    """A letter left out, doubled, exchanged for its neighbour; another separator."""
    middle = len(name) // 2
    yield name[:middle] + name[middle + 1 :]
    yield name[:middle] + name[middle] + name[middle:]
    yield name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :]
    yield name.replace("_", "-").replace(".", "-")


def test_everything_is_told_of_once() -> None:
    assert sorted(known.id for known in everything()) == sorted(ids())
    assert set(PROFILES) == set(PROFILES_FILE)
    assert set(EXIT_CODES) == set(ExitCode)


@pytest.mark.parametrize("name", list(ids()))
def test_every_id_is_explained_in_both_languages(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    (found,) = explain(name)
    for language in Language:
        assert run_main(["explain", name, "--lang", language]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"{name}  ")
        assert all(cell_len(line) <= 80 for line in out.splitlines())
        words = [t for t in (found.title, found.meaning, found.failure, found.remedy) if t]
        told = catalogue(language) if language is not Language.ENGLISH else {t: t for t in words}
        squeezed = re.sub(r"\s", "", out)
        for text in words:
            assert re.sub(r"\s", "", told[text]) in squeezed


def test_a_check_says_its_limits_in_the_profiles_that_come_along() -> None:
    (found,) = explain("kl.mean")
    told = {
        (row.profile, row.files): (row.limit, row.target, row.floor_factor) for row in found.limits
    }
    wanted = {}
    for profile, content in PROFILES_FILE.items():
        for files, limits in (("models", content["models"]), *content["gguf"].items()):
            given = limits["kl.mean"]
            factor = None if "limit" in given else given.get("floor_factor", 2.0)
            values = (given.get("limit"), given.get("target"), factor)
            wanted[profile, files] = values
    assert told == wanted
    assert {row.comparison for row in found.limits} == {"<="}
    (top,) = explain("kl.top1")
    assert {row.comparison for row in top.limits} == {">="}
    (other,) = explain("structure.finite")
    assert other.limits == ()


def test_the_limits_shown_are_those_that_judge(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["explain", "kl.mean", "kl.top1"]) == 0
    mean, _, top = capsys.readouterr().out.partition("\nkl.top1")
    assert re.search(r"default +model directories +≤ max\(1e-06, 2 × noise floor\)", mean)
    assert re.search(r"strict +model directories +≤ 1e-06\n", mean)
    assert re.search(r"default +Q5_K_M, Q4_K_M +≤ max\(0.25, 2 × quantization floor\)\n", mean)
    assert re.search(r"strict +Q5_K_M, Q4_K_M +≤ 0.25\n", mean)
    assert re.search(r"strict +other GGUF types +≥ 0.5\n", top)


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("kl.mean@F16", 1e-4),
        ("kl.mean@BF16", 1e-3),
        ("kl.mean@model-Q5_K_M.gguf", 0.25),
        ("kl.mean [tiny-Q6_K.gguf]", 0.04),
        ("kl.mean of tiny.q8_0.gguf", 0.015),
        ("kl.mean@tiny-Q2_K.gguf", 1.0),
    ],
)
def test_a_subject_narrows_the_limits_to_its_type(name: str, limit: float) -> None:
    (found,) = explain(name)
    assert found.id == "kl.mean"
    assert {row.target if row.limit is None else row.limit for row in found.limits} == {limit}


def test_a_subject_that_says_no_type_narrows_nothing() -> None:
    assert explain("kl.mean@baked") == explain("kl.mean") == explain("KL.Mean")


def test_a_group_is_all_of_its_checks() -> None:
    wanted = [check_id for check_id in GUIDE if check_id.startswith("kl.")]
    for name in ("kl", "kl.", "kl.*"):
        assert [found.id for found in explain(name)] == wanted


def test_profiles_and_types_list_their_limits() -> None:
    (strict,) = explain("strict")
    models = {row.check: row for row in strict.limits if row.files == "models"}
    assert set(models) == set(PROFILES_FILE["strict"]["models"])
    assert models["kl.max"].target == 1e-5
    (q6,) = explain("q6_k")
    assert q6.kind is Kind.FILE_TYPE
    assert {row.profile for row in q6.limits} == {"default", "strict"}
    assert {row.check: row.limit for row in q6.limits if row.profile == "strict"} == {
        check: given["limit"] for check, given in PROFILES_FILE["strict"]["gguf"]["Q6_K"].items()
    }


@pytest.mark.parametrize("name", [i for i in ids() if not i.isdigit() and len(i) > 3])
def test_a_typo_gets_the_id_it_was_meant_for(name: str) -> None:
    known = {i.casefold() for i in ids()}
    for typo in typos(name):
        if typo.casefold() not in known:
            assert name in nearest(typo), typo


def test_the_part_behind_the_dot_finds_the_check() -> None:
    assert "effect.survival" in nearest("survival")
    assert "oscillation.von_neumann" in nearest("von_neuman")
    assert nearest("71")[0] == "70"


@pytest.mark.parametrize("name", ["kl.meen", "transpsed", "strickt", "5", "", "-", "日本"])
def test_what_is_not_known_ends_with_2_and_the_nearest(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="is called"):
        explain(name)
    assert run_main(["explain", "--", name]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "so8tqc explain" in told
    for alike in nearest(name):
        assert alike in told


def test_alone_it_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    for language in Language:
        assert run_main(["explain", "--lang", language]) == 0
        lines = capsys.readouterr().out.splitlines()
        first = {line.split()[0] for line in lines if "  " in line and not line.startswith(" ")}
        assert first == set(ids())


def test_json_has_the_same_in_the_language_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["explain", "kl.mean@Q8_0", "3", "--json"]) == 0
    mean, three = json.loads(capsys.readouterr().out)
    assert (mean["id"], mean["kind"], three["kind"]) == ("kl.mean", "check", "exit code")
    assert mean["meaning"] == GUIDE["kl.mean"].meaning
    assert [row["limit"] for row in mean["limits"]] == [None, 0.015]
    assert [row["target"] for row in mean["limits"]] == [0.015, None]
    assert run_main(["explain", "--json", "--lang", "ja"]) == 0
    told = {entry["id"]: entry for entry in json.loads(capsys.readouterr().out)}
    japanese = catalogue(Language.JAPANESE)
    assert told["transposed"]["title"] == japanese[DIAGNOSES["transposed"].finding]
    assert set(told) == set(ids())


def failed_record() -> Record:
    checks: tuple[Check, ...] = (
        judge("kl.mean", 0.2, 2e-5, detail="Too far.", subject="baked"),
        judge("kl.mean", 0.3, 2e-5, detail="Too far.", subject="other"),
        judge("kl.top1", 1.0, 0.9, detail="Fine.", comparison=">=", subject="baked"),
    )
    found = Diagnosis(code="transposed", text="It was: x (1 of 1).", remedy="Bake again")
    run = RunInfo(started=datetime(2026, 1, 1, tzinfo=UTC), seconds=1.0)
    return Record(kind="qc", verdict=overall(checks), checks=checks, diagnosis=(found,), run=run)


@pytest.mark.parametrize(
    ("language", "command"),
    [
        (Language.ENGLISH, "so8tqc explain kl.mean transposed"),
        (Language.JAPANESE, "so8tqc explain kl.mean transposed --lang ja"),
    ],
)
def test_what_failed_names_its_explanation(
    language: Language, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "qc").mkdir()
    write_record(tmp_path / "qc" / "record.json", failed_record())
    with spoken(language):
        show(failed_record())
    assert command in " ".join(capsys.readouterr().out.split())
    report(tmp_path, language=language)
    out = tmp_path / "report"
    for name in ("report.html", "report.md"):
        assert command in (out / name).read_text(encoding="utf-8")
    assert "so8tqc explain kl.mean" in (out / "junit.xml").read_text(encoding="utf-8")
    assert run_main(command.split()[1:]) == 0


def test_what_passed_names_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    passed = failed_record().model_copy(
        update={"checks": failed_record().checks[2:], "diagnosis": ()}
    )
    (tmp_path / "qc").mkdir()
    write_record(tmp_path / "qc" / "record.json", passed)
    show(passed)
    report(tmp_path)
    pages = [path.read_text(encoding="utf-8") for path in (tmp_path / "report").iterdir()]
    assert not any("so8tqc explain" in text for text in (capsys.readouterr().out, *pages))
