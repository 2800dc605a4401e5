"""The command line through Typer's runner and as a process: exit codes, JSON, messages."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from so8tqc.cli.app import app
from so8tqc.cli.main import run as run_main
from so8tqc.errors import InputError
from so8tqc.llama.vendor import is_vendored
from so8tqc.record_files import write_record
from so8tqc.records import Check, Record, RunInfo, judge, overall


def record_of(kind: str, *checks: Check) -> Record:
    started = datetime(2026, 1, 1, tzinfo=UTC)
    return Record(
        kind=kind, verdict=overall(checks), checks=checks, run=RunInfo(started=started, seconds=0.5)
    )


def so8tqc(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the console script's module in a process of its own."""
    code = "import sys; from so8tqc.cli.main import main; sys.argv[0] = 'so8tqc'; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_help_does_not_import_the_heavy_libraries() -> None:
    code = (
        "import sys; from so8tqc.cli.app import app\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'plotly', 'pydantic', 'llama_cpp'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_bake_and_qc_from_the_command_line(
    llama: Path,
    make_gates: Callable[..., Path],
    texts_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gates = make_gates(llama)
    baked, out = tmp_path / "baked", tmp_path / "qc"
    assert run_main(["bake", str(llama), str(gates), "--out", str(baked), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["kind"] == "bake"
    assert record["verdict"] == "pass"

    arguments = [
        "qc",
        "--reference",
        str(llama),
        "--rotations",
        str(gates),
        "--candidate",
        str(baked),
        "--data",
        str(texts_file),
        "--max-tokens",
        "48",
        "--out",
        str(out),
    ]
    assert run_main(arguments) == 0
    assert {p.name for p in out.iterdir()} == {
        "record.json",
        "report.md",
        "report.html",
        "junit.xml",
        "tokens.npz",
        "so8tqc.log",
    }
    assert "qc: pass" in capsys.readouterr().out

    # the same candidate against the transposed gates is a failed verdict
    assert run_main([*arguments, "--convention", "row", "--quiet"]) == 1


def test_the_wrong_convention_bakes_but_does_not_pass(
    llama: Path,
    make_gates: Callable[..., Path],
    texts_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gates, baked = make_gates(llama), tmp_path / "baked"
    bake = ["bake", str(llama), str(gates), "--out", str(baked), "--convention", "row"]
    assert run_main(bake) == 0
    qc = [
        "qc",
        "--reference",
        str(llama),
        "--rotations",
        str(gates),
        "--candidate",
        str(baked),
        "--data",
        str(texts_file),
        "--level",
        "files",
        "--out",
        str(tmp_path / "qc"),
    ]
    assert run_main(qc) == 1
    assert "transposed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["bake", "nowhere", "gates.pt", "--out", "x"], 3, "config.json is missing"),
        (["bake"], 2, "Missing argument"),
        (["bake", "a", "b", "--out", "x", "--convention", "diagonal"], 2, "diagonal"),
        (["bake", "a", "b", "--out", "x", "--baked-dtype", "int8"], 2, "baked_dtype"),
        (["run", "absent.yaml"], 2, "no such config file"),
        (["doctor", "nowhere.gguf"], 3, "no such GGUF file"),
        (["frobnicate"], 2, "No such command"),
        (["report", "."], 3, "no stage has left a record"),
    ],
)
def test_errors_are_one_paragraph_with_the_right_exit_code(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(arguments) == code
    captured = capfd.readouterr()
    assert message in re.sub(r"[\s│╭╮╰╯─]+", " ", captured.err)
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_config_error_names_file_line_and_key(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("base: m\nrotations: r\nexport:\n  typ: f16\n")
    done = so8tqc("run", config)
    assert done.returncode == 2
    assert f"{config}:4" in done.stderr
    assert "export.typ" in done.stderr
    assert "type" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = so8tqc("doctor", tmp_path / "nowhere.gguf", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_without_libllama_the_command_that_mends_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import so8tqc.llama.libllama as module

    monkeypatch.setattr(module, "_library", None)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    config = tmp_path / "run.yaml"
    config.write_text("base: m\nrotations: r\n")
    assert run_main(["run", str(config), "--out", str(tmp_path / "out")]) == 4
    assert "pip install" in capfd.readouterr().err


def test_without_the_converter_vendor_is_named(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("so8tqc.llama.vendor.vendor_directory", lambda: tmp_path / "empty")
    assert run_main(["export", str(llama), "--out", str(tmp_path / "x.gguf")]) == 4
    assert "so8tqc vendor" in capfd.readouterr().err


def test_an_interrupted_run_exits_130(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("so8tqc.services.doctor.examine", interrupt)
    assert run_main(["doctor"]) == 130
    assert "Interrupted" in capfd.readouterr().err
    monkeypatch.setattr("so8tqc.cli.app.app", interrupt)  # before Typer could see it
    assert run_main(["doctor"]) == 130
    assert "Interrupted" in capfd.readouterr().err


def test_a_terminated_run_exits_143(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "so8tqc.services.doctor.examine", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
    )
    assert run_main(["doctor"]) == 143
    assert "Terminated; run the same command again" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_forbidden_folder_is_no_defect_of_ours(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "qc"
    folder.mkdir()
    write_record(folder / "record.json", record_of("qc", judge("kl.mean", 0.0, 1.0, detail="")))
    (tmp_path / "report").write_text("a file where a folder is to be made")
    assert run_main(["report", str(tmp_path), "--quiet"]) == 4
    message = capfd.readouterr().err
    assert f"{tmp_path / 'report'}: cannot write here: File exists." in message
    assert "Traceback" not in message


def test_a_defect_says_how_to_get_its_trace(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("of something")

    monkeypatch.setattr("so8tqc.services.doctor.examine", broken)
    assert run_main(["doctor"]) == 70
    message = capfd.readouterr().err
    assert "Internal error: ZeroDivisionError: of something" in message
    assert "--debug" in message
    assert "Traceback" not in message


def test_errors_are_sentences() -> None:
    full = InputError("no such file", where="a.pt", remedy="Give another.")
    assert str(full) == "a.pt: no such file. Give another."
    assert str(InputError("Is that all?")) == "Is that all?"


def test_a_reader_that_leaves_early_changes_no_verdict(tmp_path: Path) -> None:
    (tmp_path / "qc").mkdir()
    checks = [judge("kl.mean", 0.5, 1.0, detail="x" * 100, subject=str(i)) for i in range(3000)]
    write_record(tmp_path / "qc" / "record.json", record_of("qc", *checks))
    code = "import sys; from so8tqc.cli.main import main; sys.argv[0] = 'so8tqc'; main()"
    command = [sys.executable, "-c", code, "report", str(tmp_path), "--json", "--quiet"]
    # unbuffered, Python takes a write that was cut short for done and never sees the closed pipe
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    # Typer's own answer to a closed pipe is exit 1, which here would be a false verdict
    assert process.returncode == 0
    assert errors == b""


def test_doctor_describes_what_it_is_given(
    llama: Path, make_gates: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(["doctor", "--json"]) == 0
    names = {finding["name"] for finding in json.loads(capsys.readouterr().out)}
    assert {"libllama", "converter", "png", "memory", "packages"} <= names
    assert run_main(["doctor", str(llama)]) == 0
    assert "model directory, llama" in capsys.readouterr().out
    assert run_main(["doctor", str(make_gates(llama))]) == 0
    assert "rotations, exp, column" in re.sub(r"\s+", " ", capsys.readouterr().out)


@pytest.mark.llama
@pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first")
def test_the_whole_pipeline_and_its_second_run(
    llama: Path,
    make_gates: Callable[..., Path],
    texts_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = Path(__file__).parent.parent.parent
    long_text = json.loads((root / "data" / "longtext_en.json").read_text(encoding="utf-8"))
    (tmp_path / "long.txt").write_text(long_text["texts"][0], encoding="utf-8")
    # random weights have flat distributions: what is close for a real model flips their top token
    (tmp_path / "loose.yaml").write_text(
        "loose:\n  models: {kl.mean: {target: 1.0e-6}}\n"
        "  gguf: {default: {kl.mean: {limit: 0.5}}}\n"
    )
    config = tmp_path / "run.yaml"
    config.write_text(
        f"name: tiny\nbase: {llama}\nrotations: {make_gates(llama)}\nout: {tmp_path / 'out'}\n"
        f"data: [{texts_file}]\nlong_data: [{tmp_path / 'long.txt'}]\n"
        f"qc: {{max_tokens: 48, resamples: 200, profile: {tmp_path / 'loose.yaml'}}}\n"
        "calibrate: {allow_small: true, resamples: 200}\n"
        "longtext: {min_tokens: 192, max_new_tokens: 4, png: false, resamples: 200}\n"
    )
    code = run_main(["run", str(config)])
    first = capsys.readouterr().out
    assert code == 0, first
    out = tmp_path / "out"
    for path in (
        "manifest.json",
        "record.json",
        "bake/baked_model/so8tqc.json",
        "bake/report.md",
        "export/tiny-F16.gguf",
        "quantize/tiny-Q5_K_M.gguf",
        "calibrate/temperature_config.json",
        "calibrate/reliability.html",
        "qc/junit.xml",
        "qc/tokens.npz",
        "choose/report.html",
        "longtext/long_entropy.html",
        "report/report.html",
        "report/report.md",
        "report/report.json",
    ):
        assert (out / path).is_file(), path
    assert "report.html" in first

    assert run_main(["run", str(config), "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["metrics"]["stages"]
    assert list(stages) == ["bake", "export", "quantize", "calibrate", "qc", "choose", "longtext"]
    assert all(stage["reused"] for stage in stages.values())

    # a changed output is made again, and so is what depends on it
    gguf = out / "quantize" / "tiny-Q8_0.gguf"
    data = bytearray(gguf.read_bytes())
    data[-1] ^= 1
    gguf.write_bytes(data)
    assert run_main(["run", str(config), "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["metrics"]["stages"]
    assert {name for name, s in stages.items() if not s["reused"]} == {"quantize"}

    # an edited profile is another judgement, and lost plots' series are drawn again
    loose = tmp_path / "loose.yaml"
    loose.write_text(loose.read_text().replace("0.5", "0.6"))
    (out / "longtext" / "series.npz").unlink()
    assert run_main(["run", str(config), "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["metrics"]["stages"]
    assert {name for name, s in stages.items() if not s["reused"]} == {"qc", "choose", "longtext"}

    # the wrong convention bakes, and fails against the trained gates
    wrong = ["run", str(config), "--set", "bake.convention=row", "--out", str(tmp_path / "wrong")]
    assert run_main(wrong) == 1
    assert "transposed" in capsys.readouterr().out
    assert run_main(["run", str(config), "--only", "nonsense"]) == 2


def test_qc_says_what_counts_and_adds_to_a_githubs_step_summary(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary, found = tmp_path / "summary.md", tmp_path / "found.safetensors"
    summary.write_text("before\n", encoding="utf-8")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    gates = make_gates(llama)
    common = [
        "qc",
        "--reference",
        llama,
        "--rotations",
        gates,
        "--candidate",
        llama,
        "--level",
        "files",
        "--out",
        tmp_path / "qc",
    ]

    def run(*more: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, [*map(str, common), *map(str, more)])
        return result.exit_code, result.output

    assert run()[0] == 1
    code, output = run("--allow", "algebra.*", "--save-recovered", found)
    assert code == 0
    assert "fail, allowed" in output
    assert found.is_file()
    assert run("--fail-on", "structure.*")[0] == 0
    junit = (tmp_path / "qc" / "junit.xml").read_text(encoding="utf-8")
    assert 'failures="0"' in junit
    assert "failed, allowed" in junit
    text = summary.read_text(encoding="utf-8")
    assert text.startswith("before\n# qc: FAIL")
    assert text.count("# qc: ") == 3
    assert "not_baked" in text
