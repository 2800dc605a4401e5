"""What may be reused: a stage made of the same things whose outputs nobody touched."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from so8tqc.errors import InputError
from so8tqc.services.run import directory as module
from so8tqc.services.run.directory import MANIFEST_NAME, RunDirectory, read_manifest


def made(root: Path) -> tuple[RunDirectory, Path]:
    run = RunDirectory(root)
    output = root / "bake" / "model.bin"
    output.parent.mkdir()
    output.write_bytes(b"weights")
    run.commit("bake", "f1", [output.parent])
    return run, output


def test_a_stage_is_reused_by_a_later_process_if_nothing_changed(tmp_path: Path) -> None:
    made(tmp_path)
    later = RunDirectory(tmp_path)
    assert later.reusable("bake", "f1")
    assert not later.reusable("bake", "f2")
    assert not later.reusable("qc", "f1")


@pytest.mark.parametrize("how", ["changed", "same size", "deleted", "added", "renamed"])
def test_outputs_that_somebody_touched_are_made_anew(how: str, tmp_path: Path) -> None:
    run, output = made(tmp_path)
    match how:
        case "changed":
            output.write_bytes(b"other weights")
        case "same size":
            output.write_bytes(b"WEIGHTS")
        case "deleted":
            output.unlink()
        case "added":
            (output.parent / "more.bin").write_bytes(b"x")
        case _:
            output.rename(output.with_name("other.bin"))
    assert not run.reusable("bake", "f1")
    assert not RunDirectory(tmp_path).reusable("bake", "f1")


def test_a_forgotten_stage_is_not_done(tmp_path: Path) -> None:
    run, _ = made(tmp_path)
    run.forget("bake")
    assert not RunDirectory(tmp_path).reusable("bake", "f1")
    run.forget("never")


def test_a_file_is_hashed_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(module, "sha256_file", counted)
    file = tmp_path / "x"
    file.write_bytes(b"one")
    run = RunDirectory(tmp_path / "run")
    assert run.ref(file).sha256 == run.ref(file).sha256 == hashlib.sha256(b"one").hexdigest()
    assert len(hashed) == 1
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))  # a clock need not have moved
    assert run.ref(file).sha256 == hashlib.sha256(b"two").hexdigest()
    replaced = tmp_path / "y"
    replaced.write_bytes(b"six")
    os.utime(replaced, ns=(1, 1))
    replaced.replace(file)  # size and time are the old one's, the inode is not
    assert run.ref(file).sha256 == hashlib.sha256(b"six").hexdigest()
    run.save()
    assert RunDirectory(tmp_path / "run").ref(file).bytes == 3
    assert len(hashed) == 3


def test_a_manifest_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no manifest here"):
        read_manifest(tmp_path)
    for content in ("", "{", '{"stages": []}', '{"unknown": 1}', '{"stages": {"bake": {}}}'):
        (tmp_path / MANIFEST_NAME).write_text(content)
        with pytest.raises(InputError, match="unreadable manifest"):
            RunDirectory(tmp_path)


def test_a_name_that_no_file_can_have_is_not_reused(tmp_path: Path) -> None:
    run, _ = made(tmp_path)
    entry = run.manifest.stages["bake"]
    (ref,) = entry.outputs.values()
    for path in ("/nowhere/x", "a\0b"):
        entry.outputs["bake"] = ref.model_copy(update={"path": path})
        assert not run.reusable("bake", "f1")
