"""What a pipeline needs, and whom its stages believe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from so8tqc.config import BakeOptions, QCOptions, RunConfig
from so8tqc.errors import ConfigError, MissingToolError
from so8tqc.languages import Language
from so8tqc.progress import SILENT
from so8tqc.records import Record, Stopwatch, Verdict, judge
from so8tqc.rotations.enums import Convention
from so8tqc.rotations.options import RotationOptions
from so8tqc.services.run.directory import RunDirectory
from so8tqc.services.run.pipeline import Stage, _perform, run


@pytest.fixture
def without_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("so8tqc.llama.libllama._library", None)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)


def config(base: Path, gates: Path, out: Path, **options: object) -> RunConfig:
    return RunConfig(base=str(base), rotations=str(gates), out=out, **options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("without_llama")
def test_a_bake_alone_needs_no_libllama(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    record = run(config(llama, make_gates(llama), tmp_path / "out"), only="bake")
    assert record.verdict is Verdict.PASS
    stages = record.metrics["stages"]
    assert isinstance(stages, dict)
    assert list(stages) == ["bake"]


@pytest.mark.usefixtures("without_llama")
def test_a_whole_run_fails_before_it_starts_without_libllama(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(MissingToolError, match="pip install"):
        run(config(llama, make_gates(llama), tmp_path / "out"))
    assert not (tmp_path / "out" / "bake").exists()


def test_stage_names_are_checked(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"no stage 'bakery'.*bake, export"):
        run(config(llama, make_gates(llama), tmp_path / "out"), from_stage="bakery")


def test_what_the_rotations_are_reaches_the_bake_unless_it_is_told_otherwise(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    row = RotationOptions(convention=Convention.ROW)
    gates = make_gates(llama)
    for bake, expected in (
        (BakeOptions(), "row"),
        (BakeOptions(convention=Convention.COLUMN), "column"),
    ):
        out = tmp_path / expected
        run(config(llama, gates, out, rotation_options=row, bake=bake), only="bake")
        provenance = (out / "bake" / "baked_model" / "so8tqc.json").read_text()
        assert f'"convention": "{expected}"' in provenance


def test_a_stage_is_done_when_all_its_reports_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run that was interrupted between two of them would never write the others."""
    check = judge("kl.mean", 0.0, 1.0, detail="")
    record = Record(kind="qc", verdict=Verdict.PASS, checks=(check,), run=Stopwatch().info())
    stage = Stage("qc", QCOptions(), (), (), lambda _: record, reports=True)

    def interrupted(_: Record, out: Path, *__: object) -> None:
        (out / "report.html").write_text('<html lang="en">')
        (out / ".junit.xml.1234.so8tqc-partial").touch()
        raise KeyboardInterrupt

    def perform() -> None:
        _perform(stage, RunDirectory(tmp_path), SILENT, False, Language.ENGLISH)

    with monkeypatch.context() as patched:
        patched.setattr("so8tqc.services.run.pipeline.write_stage_reports", interrupted)
        with pytest.raises(KeyboardInterrupt):
            perform()
    for missing in ("junit.xml", "report.md", "report.html"):
        (tmp_path / "qc" / missing).unlink(missing_ok=True)
        perform()
        names = sorted(path.name for path in (tmp_path / "qc").iterdir())
        assert names == ["junit.xml", "record.json", "report.html", "report.md"]
