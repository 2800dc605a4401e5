"""Every file of a run, hashed again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from so8tqc.cli.main import run as run_main
from so8tqc.config import RunConfig
from so8tqc.errors import InputError
from so8tqc.records import Verdict
from so8tqc.services.attest.recheck import recheck
from so8tqc.services.run.pipeline import run


@pytest.fixture
def baked(llama: Path, make_gates: Callable[..., Path], tmp_path: Path) -> Path:
    """A run directory whose bake is done."""
    out = tmp_path / "out"
    run(RunConfig(base=str(llama), rotations=str(make_gates(llama)), out=out), only="bake")
    return out


def test_an_unchanged_run_passes_wherever_it_lies(baked: Path, tmp_path: Path) -> None:
    assert recheck(baked).metrics["files"] == {
        "bake/record.json": "unchanged",
        "bake/baked_model": "unchanged",
    }
    moved = tmp_path / "bake" / "elsewhere"  # a stage's name in the path before
    shutil.move(baked, moved)
    assert recheck(moved).verdict is Verdict.PASS


@pytest.mark.parametrize("file", ["record.json", "baked_model/model.safetensors"])
def test_a_changed_byte_is_found_although_size_and_time_are_the_same(
    file: str, baked: Path
) -> None:
    import os

    path = baked / "bake" / file
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    with path.open("r+b") as stream:  # the same inode
        stream.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    record = recheck(baked)
    changed = "bake/" + file.split("/", maxsplit=1)[0]
    assert record.check("files.changed").verdict is Verdict.FAIL
    assert record.metrics["files"][changed] == "changed"  # type: ignore[index,call-overload]
    assert run_main(["report", "--verify", str(baked), "--quiet"]) == 1


def test_a_missing_file_is_found(baked: Path) -> None:
    shutil.rmtree(baked / "bake" / "baked_model")
    assert recheck(baked).check("files.missing").verdict is Verdict.FAIL


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no manifest here"):
        recheck(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema_version": 1}')
    with pytest.raises(InputError, match="no stage was finished here"):
        recheck(tmp_path)
