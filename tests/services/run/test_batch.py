"""Batches: what is looked over beforehand, what goes on after a failure, what is reused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from so8tqc.cli.app import app
from so8tqc.cli.main import run as run_main
from so8tqc.config.batch import Batch, load_runs
from so8tqc.errors import InputError, MissingToolError, ToolError
from so8tqc.llama.vendor import is_vendored
from so8tqc.record_files import read_record
from so8tqc.records import Verdict
from so8tqc.services.run.batch import run_batch


def batch(path: Path, text: str) -> Batch:
    path.write_text(text, encoding="utf-8")
    runs = load_runs(file=path)
    assert isinstance(runs, Batch)
    return runs


@pytest.fixture
def broken(llama: Path, tmp_path: Path) -> Path:
    """A model whose header is sound; a NaN is found when its weights are folded."""
    model = tmp_path / "broken"
    shutil.copytree(llama, model)
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:start]))
    at = start + header["model.layers.1.self_attn.o_proj.weight"]["data_offsets"][0]
    data[at : at + 2] = b"\xc0\x7f"  # bfloat16 NaN
    file.write_bytes(data)
    with safe_open(file, "pt") as stored:
        assert stored.get_tensor("model.layers.1.self_attn.o_proj.weight").isnan().sum() == 1
    return model


def test_what_fails_stops_no_other_and_a_second_run_reuses_what_is_done(
    llama: Path, broken: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    make_gates(llama, "a.safetensors")
    make_gates(llama, "b.safetensors", seed=1)
    text = (
        f"out: {tmp_path / 'out'}\nmatrix:\n  base: [{broken}, {llama}]\n"
        f"  rotations: [{tmp_path / 'a.safetensors'}, {tmp_path / 'b.safetensors'}]\n"
    )
    runs = batch(tmp_path / "b.yaml", text)
    names = [f"{base.name},{gates}" for base in (broken, llama) for gates in "ab"]
    assert [c.name for c in runs.combinations] == names
    record = run_batch(runs, only="bake")
    rows = record.metrics["combinations"]
    assert isinstance(rows, dict)
    assert [row["exit_code"] for row in rows.values()] == [3, 3, 0, 0]
    assert [row["verdict"] for row in rows.values()] == ["error", "error", "pass", "pass"]
    assert "the weights hold a NaN" in rows[names[0]]["error"]
    assert record.verdict is Verdict.FAIL
    assert record.metrics["exit_code"] == 3
    assert read_record(tmp_path / "out" / "batch.json") == record
    # each combination has really its own gates
    folded = [
        (tmp_path / "out" / name / "bake" / "baked_model" / "model.safetensors").read_bytes()
        for name in names[2:]
    ]
    assert folded[0] != folded[1]


def test_all_are_looked_over_before_the_first_begins(
    llama: Path, make_gates: Callable[..., Path], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    gates = make_gates(llama)
    few = make_gates(llama, "few.safetensors", layers=2)
    text = f"out: {tmp_path / 'out'}\nmatrix:\n  base: [{llama}]\n  rotations: [{gates}, {few}]\n"
    with pytest.raises(InputError, match=r"1 of 2 combinations cannot be run.*\[.*,few\].*layer"):
        run_batch(batch(tmp_path / "b.yaml", text), only="bake")
    assert not list((tmp_path / "out").glob("*"))
    gone = text.replace(f"[{llama}]", f"[{tmp_path / 'gone'}]").replace(f", {few}", "")
    gone += f"  include:\n    - {{base: {llama}, rotations: {few}}}\n"
    with pytest.raises(InputError, match=r"2 of 2.*\[gone,gates\].*config\.json.*\[.*,few\]"):
        run_batch(batch(tmp_path / "b.yaml", gone), only="bake")


def test_a_full_disk_is_seen_for_all_together(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (llama / "model.safetensors").stat().st_size
    usage = shutil.disk_usage(tmp_path)._replace(free=int(1.5 * size))
    monkeypatch.setattr("so8tqc.disk.atomic.shutil.disk_usage", lambda _path: usage)
    make_gates(llama, "a.safetensors")
    make_gates(llama, "b.safetensors", seed=1)
    text = (
        f"base: {llama}\nout: {tmp_path / 'out'}\nmatrix:\n"
        f"  rotations: [{tmp_path / 'a.safetensors'}, {tmp_path / 'b.safetensors'}]\n"
    )
    with pytest.raises(ToolError, match="baked models of all combinations need"):
        run_batch(batch(tmp_path / "b.yaml", text), only="bake")
    one = text.replace(f", {tmp_path / 'b.safetensors'}", "")
    assert run_batch(batch(tmp_path / "b.yaml", one), only="bake").verdict is Verdict.PASS


def test_libllama_is_missed_before_anything_is_baked(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("so8tqc.llama.libllama._library", None)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    text = f"out: {tmp_path / 'out'}\nrotations: {make_gates(llama)}\nmatrix: {{base: [{llama}]}}\n"
    with pytest.raises(MissingToolError, match="pip install"):
        run_batch(batch(tmp_path / "b.yaml", text))
    assert not (tmp_path / "out").exists()


@pytest.mark.llama
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("quantize.types", "[[Q5_K_M], [Q5_K_X]]", r"Q5_K_X"),
        ("data", "[[builtin:validation], [gone.txt]]", r"gone\.txt: no such data file"),
        ("qc.profile", "[default, leniant]", r"no profile 'leniant'"),
    ],
)
@pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first")
def test_later_stages_mistakes_are_seen_before_the_first_stage(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path, key: str, value: str, message: str
) -> None:
    text = (
        f"base: {llama}\nrotations: {make_gates(llama)}\nout: {tmp_path / 'out'}\n"
        f"matrix: {{{key}: {value}}}\n"
    )
    with pytest.raises(Exception, match=rf"1 of 2 combinations.*{message}"):
        run_batch(batch(tmp_path / "b.yaml", text))
    assert not list((tmp_path / "out").glob("*"))


def test_a_defect_in_one_run_is_its_own_and_the_worst(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import so8tqc.services.run.batch as module

    real, seen = module.run, []

    def faulty(config: object, *arguments: object, **options: object) -> object:
        seen.append(config)
        if len(seen) == 1:
            raise ZeroDivisionError("of something")
        return real(config, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "run", faulty)
    text = (
        f"base: {llama}\nrotations: {make_gates(llama)}\nout: {tmp_path / 'out'}\n"
        "matrix: {qc.seed: [0, 1]}\n"
    )
    record = run_batch(batch(tmp_path / "b.yaml", text), only="bake")
    rows = record.metrics["combinations"]
    assert isinstance(rows, dict)
    assert [row["exit_code"] for row in rows.values()] == [70, 0]
    assert "ZeroDivisionError: of something" in rows["seed=0"]["error"]
    assert record.metrics["exit_code"] == 70


def test_an_interrupted_batch_tells_how_far_it_came(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import so8tqc.services.run.batch as module

    real, seen = module.run, []

    def interrupted(config: object, *arguments: object, **options: object) -> object:
        seen.append(config)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(config, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "run", interrupted)
    text = (
        f"base: {llama}\nrotations: {make_gates(llama)}\nout: {tmp_path / 'out'}\n"
        "matrix: {qc.seed: [0, 1, 2]}\n"
    )
    with pytest.raises(KeyboardInterrupt):
        run_batch(batch(tmp_path / "b.yaml", text), only="bake")
    rows = read_record(tmp_path / "out" / "batch.json").metrics["combinations"]
    assert isinstance(rows, dict)
    assert [row["verdict"] for row in rows.values()] == ["pass", "not run", "not run"]


@pytest.mark.llama
@pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first")
def test_a_whole_batch_from_the_command_line(
    llama: Path,
    make_gates: Callable[..., Path],
    texts_file: Path,
    long_texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "loose.yaml").write_text(
        "loose:\n  models: {kl.mean: {target: 1.0e-6}}\n"
        "  gguf: {default: {kl.mean: {limit: 0.5}}}\n"
    )
    file = tmp_path / "b.yaml"
    file.write_text(
        f"base: {llama}\nrotations: {make_gates(llama)}\nout: {tmp_path / 'out'}\n"
        f"data: [{texts_file}]\nlong_data: [{long_texts}]\n"
        f"qc: {{max_tokens: 48, resamples: 200, profile: {tmp_path / 'loose.yaml'}}}\n"
        "calibrate: {allow_small: true, resamples: 200, png: false}\nchoose: {repeats: 1}\n"
        "longtext: {min_tokens: 192, max_new_tokens: 0, png: false, resamples: 200}\n"
        "quantize: {pure: true}\n"
        "matrix:\n  quantize.types: [[Q5_0]]\n  bake.convention: [row, column]\n"
    )
    # the gates are column gates: baked as row gates they fail, which stops nobody
    assert run_main(["run", str(file)]) == 1
    shown = capsys.readouterr().out
    assert "batch: FAIL" in shown
    record = read_record(tmp_path / "out" / "batch.json")
    rows = record.metrics["combinations"]
    assert isinstance(rows, dict)
    assert {name: (row["verdict"], row["exit_code"]) for name, row in rows.items()} == {
        "Q5_0,row": ("fail", 1),
        "Q5_0,column": ("pass", 0),
    }
    # the tables show what the runs' own records hold
    qc = read_record(tmp_path / "out" / "Q5_0,column" / "qc" / "record.json")
    value = qc.check("kl.mean", "model-Q5_0.gguf").value
    size = (tmp_path / "out" / "Q5_0,column" / "quantize" / "model-Q5_0.gguf").stat().st_size
    file_row = rows["Q5_0,column"]["files"]["model-Q5_0.gguf"]
    assert (file_row["kl_mean"], file_row["bytes"]) == (value, size)
    page = (tmp_path / "out" / "batch.md").read_text(encoding="utf-8")
    assert f"| Q5_0,column | model-Q5_0.gguf | {size / 1e3:.1f} kB | {value:.4g} |" in page
    assert page.strip() in summary.read_text(encoding="utf-8")
    assert f"{value:.4g}" in shown

    result = CliRunner().invoke(app, ["run", str(file), "--json", "--quiet"])
    assert result.exit_code == 1
    again = json.loads(result.output)
    assert {name: len(stages) for name, stages in again["run"]["measured"]["reused"].items()} == {
        "Q5_0,row": 7,
        "Q5_0,column": 7,
    }
    assert again["metrics"] == record.model_dump(mode="json")["metrics"]

    # a grown matrix runs what is new, and reuses what it had
    assert (
        run_main(
            [
                "run",
                str(file),
                "--json",
                "--set",
                "matrix.quantize.types=[[Q5_0], [Q5_1]]",
                "--set",
                "matrix.bake.convention=[column]",
            ]
        )
        == 0
    )
    reused = json.loads(capsys.readouterr().out)["run"]["measured"]["reused"]
    assert {name: len(stages) for name, stages in reused.items()} == {
        "Q5_0,column": 7,
        "Q5_1,column": 0,
    }
