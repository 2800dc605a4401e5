"""Two processes and one output: the second is refused, and temporaries have an owner."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from so8tqc.config import BakeConfig, QuantizeConfig, RunConfig
from so8tqc.disk import locks
from so8tqc.disk.atomic import remove_leftovers
from so8tqc.disk.locks import claim_folder, claim_output
from so8tqc.errors import BusyError, ExitCode
from so8tqc.services.bake import bake
from so8tqc.services.quantize.service import quantize
from so8tqc.services.report import report
from so8tqc.services.run.pipeline import run

_HOLD = """
import sys
from pathlib import Path
from so8tqc.disk.{module} import {name}
with {name}(Path(sys.argv[1])) as made:
    if made is not None and made.is_dir():
        (made / "half").write_text("written")
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(name: str, path: Path, module: str = "locks") -> Iterator[subprocess.Popen[str]]:
    """Another process inside a context manager of ours; it leaves when this one does."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD.format(module=module, name=name), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:  # its end closes the pipes, and waits
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


@pytest.mark.parametrize("name", ["claim_folder", "claim_output"])
def test_the_second_process_is_refused_and_told_by_whom(name: str, tmp_path: Path) -> None:
    claim = {"claim_folder": claim_folder, "claim_output": claim_output}[name]
    out = tmp_path / "deep" / "out"
    with held(name, out) as process:
        with (
            pytest.raises(BusyError, match=rf"deep/out: process {process.pid} is writing") as told,
            claim(out),
        ):
            pass
        assert told.value.exit_code is ExitCode.TOOL
    with claim(out):
        pass
    assert list(tmp_path.iterdir()) == []  # neither locks nor directories stay


@pytest.mark.parametrize("name", ["claim_folder", "claim_output"])
def test_the_lock_of_a_killed_process_blocks_nobody(name: str, tmp_path: Path) -> None:
    claim = {"claim_folder": claim_folder, "claim_output": claim_output}[name]
    with held(name, tmp_path / "out") as process:
        process.kill()
        process.wait()
        assert [p for p in tmp_path.rglob("*") if p.name.endswith(".so8tqc.lock")]
        with claim(tmp_path / "out"):
            pass
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".so8tqc.lock")]


def test_who_waits_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[object] = []
    opened = threading.Event()
    real = locks.lock_descriptor

    def seen(descriptor: int, *, wait: bool = False) -> bool:
        opened.set()
        return real(descriptor, wait=wait)

    def wait() -> None:
        with claim_folder(tmp_path, wait=True):
            order.append("second")
            # not the file that the first has deleted, which would keep nobody else out
            order.append((tmp_path / ".so8tqc.lock").exists())

    with held("claim_folder", tmp_path) as process:
        monkeypatch.setattr(locks, "lock_descriptor", seen)
        thread = threading.Thread(target=wait)
        thread.start()
        opened.wait()
        order.append("first")
        assert process.stdin is not None
        process.stdin.close()
        thread.join()
    assert order == ["first", "second", True]


def test_a_claim_holds_within_its_thread_alone(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def other() -> None:
        try:
            with claim_folder(tmp_path):
                pass
        except BusyError as error:
            errors.append(error)

    with claim_folder(tmp_path), claim_folder(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(errors) == 1


@pytest.mark.parametrize("kind", ["atomic_file", "atomic_directory"])
def test_temporaries_of_a_live_process_are_left_alone(kind: str, tmp_path: Path) -> None:
    with held(kind, tmp_path / "model", "atomic") as process:
        before = sorted(tmp_path.rglob("*"))
        assert remove_leftovers(tmp_path) == []
        assert sorted(tmp_path.rglob("*")) == before
        process.kill()
        process.wait()
        assert len(remove_leftovers(tmp_path)) == 1
        assert list(tmp_path.iterdir()) == []


def test_a_bake_leaves_the_temporaries_of_its_neighbour(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    """Both outputs lie in one directory, which either bake sweeps before it begins."""
    out = tmp_path / "outputs"
    with held("atomic_directory", out / "other", "atomic") as process:
        bake(BakeConfig(base=llama, rotations=make_gates(llama), out=out / "baked"))
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() == 0
    assert (out / "other" / "half").read_text() == "written"
    assert sorted(p.name for p in out.iterdir()) == ["baked", "other"]


def test_stages_and_runs_are_refused_before_they_write(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    gates = make_gates(llama)
    with held("claim_output", tmp_path / "baked"), pytest.raises(BusyError):
        bake(BakeConfig(base=llama, rotations=gates, out=tmp_path / "baked"))
    for name in ("bake", "quantize", "report"):
        out = tmp_path / name
        with held("claim_folder", out) as process:
            with pytest.raises(BusyError, match=f"process {process.pid} "):
                if name == "bake":
                    run(RunConfig(base=str(llama), rotations=str(gates), out=out), only="bake")
                elif name == "quantize":
                    quantize(QuantizeConfig(gguf=llama / "x.gguf", out=out))
                else:
                    report(out)
            assert [p.name for p in out.iterdir()] == [".so8tqc.lock"]


def test_one_of_two_runs_at_the_same_time_does_the_work(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    """However they interleave: whoever was refused wrote nothing, and the result is one run's."""
    rotations = [make_gates(llama, f"g{seed}.safetensors", seed=seed) for seed in (1, 2)]
    out = tmp_path / "baked"
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "so8tqc", "bake", str(llama), str(gates), "--out", str(out)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for gates in rotations
    ]
    said = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert set(codes) <= {0, 4}
    assert 0 in codes
    for code, text in zip(codes, said, strict=True):
        assert code == 0 or "is writing here" in text
    named = [str(gates) in (out / "so8tqc.json").read_text() for gates in rotations]
    record = (tmp_path / "baked.record.json").read_text()
    assert named == [str(gates) in record for gates in rotations]
    assert sum(named) == 1
