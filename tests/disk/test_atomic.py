"""Atomic files, fingerprints, and what a manifest lets a run reuse."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from so8tqc.disk.atomic import atomic_directory, atomic_file, remove_leftovers
from so8tqc.disk.digests import file_ref, sha256_json
from so8tqc.errors import ExitCode, InputError, ToolError
from so8tqc.record_files import read_record, write_record
from so8tqc.records import Record, Stopwatch, Verdict, jsonable, judge
from so8tqc.services.run.directory import RunDirectory


def test_a_file_is_absent_or_complete(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("make", [atomic_file, atomic_directory])
def test_what_the_disk_refuses_is_a_tool_error(
    make: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path
) -> None:
    """A device that is full; and what has no number is no word of the system."""
    with (
        pytest.raises(ToolError, match=r"cannot read or write: No space left.*") as told,
        make(tmp_path / "x"),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert told.value.exit_code is ExitCode.TOOL
    assert str(tmp_path / "x") in str(told.value)
    with pytest.raises(OSError, match="of a library"), make(tmp_path / "x"):
        raise OSError("of a library")
    (tmp_path / "file").touch()
    with pytest.raises(ToolError, match=r"file: cannot write here"), make(tmp_path / "file" / "x"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with atomic_directory(path) as temporary:
        (temporary / "a").write_text("1")
    with pytest.raises(ValueError, match="boom"), atomic_directory(path) as temporary:
        (temporary / "b").write_text("2")
        raise ValueError("boom")
    assert [p.name for p in path.iterdir()] == ["a"]
    with atomic_directory(path) as temporary:
        (temporary / "c").write_text("3")
    assert [p.name for p in path.iterdir()] == ["c"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_killed_process_leaves_only_what_the_next_run_removes(tmp_path: Path) -> None:
    code = (
        "import os, signal, pathlib; from so8tqc.disk.atomic import atomic_directory\n"
        f"with atomic_directory(pathlib.Path({str(tmp_path / 'model')!r})) as t:\n"
        "    (t / 'config.json').write_text('{}')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -9
    assert not (tmp_path / "model").exists()
    assert len(list(tmp_path.iterdir())) == 1
    assert len(remove_leftovers(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [atomic_file, atomic_directory])
@pytest.mark.parametrize("name", ["model", "[a] model*"])
def test_another_try_sweeps_up_what_a_killed_one_left(
    make: Callable[[Path], AbstractContextManager[Path]], name: str, tmp_path: Path
) -> None:
    code = (
        "import os, pathlib, signal, sys; from so8tqc.disk import atomic\n"
        "with getattr(atomic, sys.argv[1])(pathlib.Path(sys.argv[2])):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for left in (name, "other"):
        command = [sys.executable, "-c", code, make.__name__, str(tmp_path / left)]
        assert subprocess.run(command, check=False).returncode == -9
    with make(tmp_path / name), make(tmp_path / name):  # the second leaves the first's alone
        assert len(list(tmp_path.iterdir())) == 3
    kept = {path.name for path in tmp_path.iterdir()}
    assert len(kept) == 2
    assert name in kept
    assert any(path.startswith(".other.") for path in kept)


def test_digests_are_cached_until_the_file_changes(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    path = tmp_path / "data.bin"
    path.write_bytes(b"one")
    first = directory.ref(path).sha256
    assert first == hashlib.sha256(b"one").hexdigest()
    stat = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert directory.ref(path).sha256 != first
    assert directory.ref(path) == file_ref(path)
    with pytest.raises(InputError, match="no such file"):
        directory.ref(tmp_path / "absent")


def test_directory_digests_depend_on_names_and_contents(tmp_path: Path) -> None:
    def digest(**files: str) -> str:
        folder = tmp_path / sha256_json(files)
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        return file_ref(folder).sha256

    digests = {digest(a="1", b="2"), digest(a="2", b="1"), digest(a="1"), digest(c="1", b="2")}
    assert len(digests) == 4


def test_a_stage_is_reused_only_if_its_outputs_are_unchanged(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    output = tmp_path / "out.txt"
    output.write_text("made")
    directory.commit("bake", "fingerprint", [output])
    again = RunDirectory(tmp_path)
    assert again.reusable("bake", "fingerprint")
    assert not again.reusable("bake", "another")
    assert not again.reusable("export", "fingerprint")
    output.write_text("edited")
    assert not RunDirectory(tmp_path).reusable("bake", "fingerprint")
    output.unlink()
    assert not RunDirectory(tmp_path).reusable("bake", "fingerprint")
    again.forget("bake")
    assert not RunDirectory(tmp_path).reusable("bake", "fingerprint")


def test_damaged_manifests_and_records_are_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest.json.*unreadable.*Delete it"):
        RunDirectory(tmp_path)
    (tmp_path / "record.json").write_text('{"kind": "qc"}')
    with pytest.raises(InputError, match="not a record"):
        read_record(tmp_path / "record.json")
    with pytest.raises(InputError, match="no record here"):
        read_record(tmp_path / "absent.json")


def test_a_record_with_nan_is_strict_json_and_comes_back(tmp_path: Path) -> None:
    record = Record(
        kind="qc",
        verdict=Verdict.FAIL,
        checks=(judge("kl.mean", float("nan"), 1.0, detail="", ci95=(0.0, float("inf"))),),
        metrics={"values": jsonable([1.0, float("nan"), float("-inf")])},
        run=Stopwatch().info(),
    )
    write_record(tmp_path / "record.json", record)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads((tmp_path / "record.json").read_text(), parse_constant=refuse)
    assert content["metrics"]["values"] == [1.0, "nan", "-inf"]
    check = read_record(tmp_path / "record.json").checks[0]
    assert check.value is not None
    assert math.isnan(check.value)
    assert check.ci95 == (0.0, math.inf)
    assert check.verdict is Verdict.FAIL
