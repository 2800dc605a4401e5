"""``so8tqc.log``: what it says, where it lies, and what it never touches."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from so8tqc.cli.log import log_beside
from so8tqc.cli.main import run as run_main
from so8tqc.disk.digests import file_ref

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (INFO|WARNING|ERROR) .+")


def lines(path: Path) -> list[str]:
    """The log without its times."""
    return [line.partition("Z ")[2] for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_bakes_log_lies_beside_the_model_and_the_model_is_the_same_without_it(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    from so8tqc.config import BakeConfig
    from so8tqc.services.bake import bake

    gates = make_gates(llama)
    assert run_main(["bake", str(llama), str(gates), "--out", str(tmp_path / "m"), "--quiet"]) == 0
    bake(BakeConfig(base=llama, rotations=gates, out=tmp_path / "plain"))
    assert file_ref(tmp_path / "m").sha256 == file_ref(tmp_path / "plain").sha256
    assert not list((tmp_path / "m").rglob("*.log"))
    log = tmp_path / "m.so8tqc.log"
    assert all(LINE.fullmatch(line) for line in log.read_text(encoding="utf-8").splitlines())
    said = lines(log)
    assert re.fullmatch(r"INFO begin so8tqc bake, process \d+", said[0])
    assert re.search(r"so8tqc \d.*torch \d.*transformers \d", said[1])
    assert json.loads(said[2].removeprefix("INFO config "))["base"] == str(llama)
    assert "INFO verdict bake: pass" in said
    assert re.fullmatch(r"INFO end so8tqc bake, \d+\.\d s", said[-1])
    tasks = [line.removeprefix("INFO begin ") for line in said[3:] if "INFO begin" in line]
    assert tasks
    assert all(any(line.startswith(f"INFO end {task}, ") for line in said) for task in tasks)


def test_a_dry_run_writes_no_log(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    gates = make_gates(llama)
    before = set(tmp_path.iterdir())
    arguments = ["bake", str(llama), str(gates), "--out", str(tmp_path / "m"), "--dry-run"]
    assert run_main([*arguments, "--quiet"]) == 0
    assert set(tmp_path.iterdir()) == before


def test_a_log_is_appended_and_tells_what_failed(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    out, gates = tmp_path / "qc", make_gates(llama)
    qc = [
        "qc",
        "--reference",
        str(llama),
        "--rotations",
        str(gates),
        "--candidate",
        str(llama),
        "--level",
        "files",
        "--out",
        str(out),
        "--quiet",
    ]
    assert run_main(qc) == 1
    once = lines(out / "so8tqc.log")
    assert any(line.startswith("WARNING fail algebra.") for line in once)
    assert any(line.startswith("WARNING diagnosis not_baked: ") for line in once)
    assert "INFO verdict qc: fail" in once
    assert run_main(qc) == 1
    assert lines(out / "so8tqc.log")[: len(once)] == once
    assert len(lines(out / "so8tqc.log")) == 2 * len(once)
    assert logging.getLogger("so8tqc").handlers == []


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (ZeroDivisionError("of something"), 70, "ERROR crashed"),
        (KeyboardInterrupt(), 130, "WARNING interrupted"),
    ],
)
def test_what_ends_a_command_is_logged(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    word: str,
) -> None:
    def end(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr("so8tqc.services.bake._prepared", end)
    assert run_main(["bake", str(llama), "g", "--out", str(tmp_path / "m"), "--quiet"]) == code
    text = (tmp_path / "m.so8tqc.log").read_text(encoding="utf-8")
    assert word in text
    assert ("Traceback" in text) == (code == 70)


def test_an_error_is_logged_with_its_traceback(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "m"
    assert run_main(["bake", str(llama), "gone.pt", "--out", str(out), "--quiet"]) == 3
    text = (tmp_path / "new" / "m.so8tqc.log").read_text(encoding="utf-8")
    assert "ERROR stopped" in text
    assert "Traceback (most recent call last)" in text
    assert "InputError" in text or "RotationError" in text
    assert "gone.pt" in text


def test_a_log_is_no_part_of_what_decides_reuse(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    from so8tqc.config import RunConfig
    from so8tqc.services.run.pipeline import run

    gates, config = make_gates(llama), tmp_path / "run.yaml"
    config.write_text(f"base: {llama}\nrotations: {gates}\nout: {tmp_path / 'out'}\n")
    assert run_main(["run", str(config), "--only", "bake", "--quiet"]) == 0
    manifest = (tmp_path / "out" / "manifest.json").read_text()
    assert any("begin stage bake" in line for line in lines(tmp_path / "out" / "so8tqc.log"))
    shutil.rmtree(tmp_path / "out")
    run(RunConfig(base=str(llama), rotations=str(gates), out=tmp_path / "out"), only="bake")
    assert not (tmp_path / "out" / "so8tqc.log").exists()
    without = (tmp_path / "out" / "manifest.json").read_text()
    found = [json.loads(text)["stages"]["bake"]["fingerprint"] for text in (manifest, without)]
    assert found[0] == found[1]
    assert "so8tqc.log" not in manifest


def test_where_logs_lie() -> None:
    assert log_beside(Path("o/record.json")) == Path("o/so8tqc.log")
    assert log_beside(Path("m-F16.gguf.record.json")) == Path("m-F16.gguf.so8tqc.log")


def test_a_batch_has_one_log_with_the_tracebacks_of_all(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "seed=1").write_text("a file where a directory is to be made")
    config = tmp_path / "b.yaml"
    config.write_text(
        f"base: {llama}\nrotations: {make_gates(llama)}\nout: {tmp_path / 'out'}\n"
        "matrix: {qc.seed: [0, 1, 2]}\n"
    )
    assert run_main(["run", str(config), "--only", "bake", "--quiet"]) == 4
    said = lines(tmp_path / "out" / "so8tqc.log")
    assert [line for line in said if line.startswith("INFO [")] == [
        "INFO [1/3] seed=0",
        "INFO [2/3] seed=1",
        "INFO [3/3] seed=2",
    ]
    assert [line for line in said if line.startswith("ERROR")] == ["ERROR seed=1 stopped"]
    assert "Traceback" in (tmp_path / "out" / "so8tqc.log").read_text()
    assert list((tmp_path / "out").rglob("*.log")) == [tmp_path / "out" / "so8tqc.log"]
