"""Every way of copying gives the same file, whatever the file system can do."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from so8tqc.checkpoints import copy
from so8tqc.checkpoints.copy import Run, copy_runs, create
from so8tqc.checkpoints.patch import patch_files
from so8tqc.checkpoints.safetensors_index import TensorEntry, torch_dtype
from so8tqc.errors import ModelError


class Negative:
    """Stores −x in another dtype."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def pieces(self, stored: torch.Tensor) -> Iterator[torch.Tensor]:
        for rows in stored.split(3):
            yield (-rows).to(torch_dtype(self.dtype))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.randn(7, 11 + i, generator=generator).half() for i in range(5)}
    path = tmp_path / "source.safetensors"
    save_file(tensors, str(path), metadata={"format": "pt", "note": "é"})
    return path


def no_copy_file_range(monkeypatch: pytest.MonkeyPatch, _source: Path) -> None:
    def refuse(*_arguments: object) -> int:
        raise OSError(errno.EXDEV, "across file systems")

    monkeypatch.setattr(os, "copy_file_range", refuse)


def cloning_file_system(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    """Where FICLONE works, the new file is whole before anything is copied."""

    def clone(path: Path, descriptor: int) -> bool:
        assert path == source
        os.write(descriptor, path.read_bytes())
        return True

    monkeypatch.setattr(copy, "_reflink", clone)
    monkeypatch.setattr("so8tqc.checkpoints.patch.copy_runs", None)  # would fail if called


def as_it_is(_monkeypatch: pytest.MonkeyPatch, _source: Path) -> None:
    pass


@pytest.mark.parametrize("prepare", [as_it_is, no_copy_file_range, cloning_file_system])
@pytest.mark.parametrize("targets", [("t0",), ("t4",), ("t1", "t2"), ()])
def test_targets_change_and_nothing_else_does(
    prepare: Callable[[pytest.MonkeyPatch, Path], None],
    targets: tuple[str, ...],
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepare(monkeypatch, source)
    old = source.read_bytes()
    destination = source.with_name("new.safetensors")
    patch_files([(source, destination)], {name: Negative("F16") for name in targets})
    before, after = load_file(str(source)), load_file(str(destination))
    for name, value in before.items():
        expected = -value if name in targets else value
        assert torch.equal(after[name].view(torch.int16), expected.view(torch.int16))
    assert source.read_bytes() == old
    new = destination.read_bytes()
    assert len(new) == len(old)
    assert (
        new[: len(old) - 2 * sum(v.numel() for v in before.values())]
        == (old[: len(old) - 2 * sum(v.numel() for v in before.values())])
    )  # the header


@pytest.mark.parametrize("prepare", [as_it_is, no_copy_file_range])
def test_a_dtype_that_changes_gives_a_new_header_and_moves_the_rest(
    prepare: Callable[[pytest.MonkeyPatch, Path], None],
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepare(monkeypatch, source)
    destination = source.with_name("new.safetensors")
    told: dict[str, bytes] = {}

    def written(entry: TensorEntry, sha256: str) -> None:
        told[entry.name] = entry.file.read_bytes()[entry.start : entry.end]
        assert sha256 == hashlib.sha256(told[entry.name]).hexdigest()

    patches = {"t1": Negative("F32"), "t3": Negative("F16")}
    patch_files([(source, destination)], patches, written)
    before, after = load_file(str(source)), load_file(str(destination))
    assert told == {name: after[name].numpy().tobytes() for name in patches}
    assert {n: v.dtype for n, v in after.items()} == {
        n: torch.float32 if n == "t1" else torch.float16 for n in before
    }
    for name, value in before.items():
        expected = -value if name in ("t1", "t3") else value
        assert torch.equal(after[name].float(), expected.float())
    with safe_open(str(destination), framework="pt") as handle:
        assert handle.metadata() == {"format": "pt", "note": "é"}


def test_a_source_that_ends_early_is_an_error(tmp_path: Path) -> None:
    source, destination = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"x" * 10)
    create(destination, 20, clone=None)
    with pytest.raises(ModelError, match="ended early"):
        copy_runs(source, destination, [Run(0, 0, 20)], Event())


def test_a_copy_can_be_given_up(tmp_path: Path) -> None:
    source, destination = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"x" * 10)
    create(destination, 10, clone=None)
    stop = Event()
    stop.set()
    copy_runs(source, destination, [Run(0, 0, 10)], stop)
    assert destination.read_bytes() == bytes(10)


def test_a_file_that_exists_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        create(tmp_path / "a", 3, clone=None)
    assert (tmp_path / "a").read_bytes() == b"precious"


def test_an_error_of_the_disk_is_not_taken_for_a_missing_feature(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space left"):
        patch_files([(source, source.with_name("new.safetensors"))], {})
    shutil.rmtree(source.parent)
