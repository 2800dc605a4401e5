"""Attest and verify without a run directory: records beside outputs, followed back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.cli.main import run as run_main
from so8tqc.config import ExportConfig, QuantizeConfig
from so8tqc.llama.vendor import is_vendored
from so8tqc.record_files import record_beside, write_record
from so8tqc.services.attest.statement import read_statement


@pytest.fixture
def made(llama: Path, make_gates: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder with a baked directory and its record, made by the command."""
    gates = make_gates(llama)
    assert run_main(["bake", str(llama), str(gates), "--out", str(tmp_path / "b"), "--quiet"]) == 0
    return tmp_path


@pytest.fixture
def files(made: Path) -> tuple[Path, Path]:
    from so8tqc.services.export.service import export
    from so8tqc.services.quantize.service import quantize

    f16 = made / "tiny-F16.gguf"
    write_record(record_beside(f16), export(ExportConfig(model=made / "b", out=f16)))
    record = quantize(QuantizeConfig(gguf=f16, types=("Q8_0", "Q4_0"), out=made / "q"))
    write_record(made / "q" / "record.json", record)
    return f16, Path(record.outputs["Q8_0"].path)


def links(path: Path) -> list[str]:
    return [link.kind for link in read_statement(path).predicate.links]


def found(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    record = json.loads(capsys.readouterr().out)
    return {name: link["found"] for name, link in record["metrics"]["links"].items()}


def test_a_bake_is_attested_and_made_again(
    made: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(["attest", str(made / "b"), "--quiet"]) == 0
    statement = made / "b.attestation.json"
    assert links(statement) == ["bake"]
    options = ["--base", str(llama), "--rotations", str(made / "gates.safetensors")]
    capsys.readouterr()
    assert run_main(["verify", str(statement), *options, "--json", "--quiet"]) == 0
    assert found(capsys) == {"bake": "identical"}
    assert run_main(["verify", str(made / "b"), "--json", "--quiet"]) == 0
    assert found(capsys) == {"bake": "identical"}


def test_a_changed_bake_is_found(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = next(e for n, e in open_checkpoint(made / "b").tensors.items() if "o_proj" in n)
    with entry.file.open("r+b") as stream:
        stream.seek(entry.start)
        stream.write(b"\x00\x40")
    capsys.readouterr()
    assert run_main(["verify", str(made / "b"), "--json", "--quiet"]) == 1
    assert found(capsys) == {"bake": "different"}


def test_without_a_record_it_says_so(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record_beside(made / "b").unlink()
    assert run_main(["attest", str(made / "b")]) == 3
    assert "no record beside it" in " ".join(capsys.readouterr().err.split())


@pytest.mark.llama
@pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first")
class TestFiles:
    def test_a_file_leads_back_to_its_base(
        self, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        f16, q8 = files
        assert run_main(["attest", str(q8), "--quiet"]) == 0
        statement = q8.with_name(f"{q8.name}.attestation.json")
        assert links(statement) == ["bake", "export", "quantize"]
        names = {subject.name for subject in read_statement(statement).subject}
        assert "quantize/tiny-Q8_0.gguf" in names
        assert "quantize/tiny-Q4_0.gguf" not in names
        capsys.readouterr()
        assert run_main(["verify", str(f16), "--json", "--quiet"]) == 0
        assert found(capsys) == {"bake": "identical", "export": "identical"}

    def test_the_way_back_may_end_and_that_is_said(
        self, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        f16, q8 = files
        record_beside(f16).unlink()
        capsys.readouterr()
        assert run_main(["attest", str(q8), "--json", "--quiet"]) == 0
        assert "no record beside it" in json.loads(capsys.readouterr().out)["notices"][0]
        statement = q8.with_name(f"{q8.name}.attestation.json")
        assert links(statement) == ["quantize"]
        assert run_main(["verify", str(statement), "--json", "--quiet"]) == 0
        record = json.loads(capsys.readouterr().out)
        skips = [c["id"] for c in record["checks"] if c["verdict"] == "skip"]
        assert "statement.origin" in skips
        assert record["metrics"]["links"]["quantize Q8_0"]["found"] == "not checked"
        shutil.copy(f16, q8.parent / f16.name)
        assert run_main(["verify", str(statement), "--json", "--quiet"]) == 0
        assert found(capsys) == {"quantize Q8_0": "identical"}

    def test_a_file_that_is_another_is_refused(
        self, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copy(files[0], files[1])
        assert run_main(["attest", str(files[1])]) == 3
        assert "not the file that quantize recorded" in " ".join(capsys.readouterr().err.split())
