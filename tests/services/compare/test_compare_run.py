"""A run directory read back: names without what only says which run it is of."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from so8tqc.errors import InputError
from so8tqc.record_files import write_record
from so8tqc.records import Record, RunInfo, Verdict
from so8tqc.services.compare.run import read_run, require_two

INFO = RunInfo(started=datetime(2026, 1, 1, tzinfo=UTC), seconds=1.0)


def write(directory: Path, kind: str, **fields: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    record = Record(kind=kind, verdict=Verdict.PASS, run=INFO, **fields)  # type: ignore[arg-type]
    write_record(directory / "record.json", record)
    return directory


def test_a_run_knows_its_stages_name_and_root(tmp_path: Path) -> None:
    write(tmp_path, "run", metrics={"name": "tiny"}, config={"out": "out/mine/"})
    write(tmp_path / "bake", "bake")
    write(tmp_path / "qc", "qc")
    run = read_run(tmp_path)
    assert set(run.stages) == {"bake", "qc"}
    assert (run.name, run.root, run.tables) == ("tiny", "out/mine", {})
    assert run.plain("tiny-Q4_K_M.gguf") == "Q4_K_M.gguf"
    assert run.plain("out/mine/quantize/x.gguf") == "OUT/quantize/x.gguf"
    assert run.plain("out/mine") == "OUT"
    assert run.plain("out/mine2/x") == "out/mine2/x"
    assert run.plain("nottiny-Q4.gguf") == "nottiny-Q4.gguf"


def test_a_stage_alone_is_a_run_of_one(tmp_path: Path) -> None:
    write(tmp_path, "qc", config={"out": str(tmp_path)})
    run = read_run(tmp_path)
    assert list(run.stages) == ["qc"]
    assert (run.name, run.whole) == ("", None)
    assert run.plain(f"{tmp_path}/x") == "OUT/x"
    assert run.plain("tiny-Q4.gguf") == "tiny-Q4.gguf"


def test_what_holds_no_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        read_run(tmp_path)


def test_two_directories_are_two(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    with pytest.raises(InputError, match="no such run directory"):
        require_two(a, b)
    b.symlink_to(a)
    with pytest.raises(InputError, match="compared with itself"):
        require_two(a, b)
    b.unlink()
    b.mkdir()
    require_two(a, b)
