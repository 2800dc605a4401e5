"""Whole runs with adapters: every stage judges the trained model, base and adapters unmerged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from peft_cases import adapter
from typer.testing import CliRunner

from so8tqc.cli.app import app
from so8tqc.config import AttestConfig, RunConfig, VerifyConfig
from so8tqc.disk.digests import sha256_file, sha256_json
from so8tqc.errors import InputError
from so8tqc.llama.vendor import is_vendored
from so8tqc.record_files import read_record
from so8tqc.records import Record, Verdict
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.rotation_set import Target
from so8tqc.services.attest.service import attest
from so8tqc.services.attest.statement import read_statement
from so8tqc.services.attest.verify_statement import verify_statement
from so8tqc.services.run.pipeline import run

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first"),
]

STAGES = ("bake", "export", "quantize", "calibrate", "qc", "choose", "longtext")


@pytest.fixture(scope="module")
def sources(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``base``, ``gates.safetensors``, several adapters, and texts."""
    folder = tmp_path_factory.mktemp("sources")
    shutil.copytree(make_model("llama", "float32"), folder / "base")
    generator = np.random.default_rng(3)
    write_native(
        folder / "gates.safetensors",
        {Target(i): generator.normal(size=(8, 8, 8)) * 0.3 for i in range(3)},
        parametrization=Parametrization.EXP,
        convention=Convention.COLUMN,
        site=Site.INPUT,
        pet=None,
    )
    adapter(folder / "base", folder / "first", "lora")
    adapter(folder / "base", folder / "second", "dora", seed=1)
    adapter(folder / "base", folder / "oft", "oft", seed=2)
    adapter(folder / "base", folder / "waveft", "waveft", seed=3)
    adapter(folder / "base", folder / "miss", "miss-mini", seed=4)
    data = Path(__file__).parents[2] / "data"
    texts = json.loads((data / "validation_en.json").read_text(encoding="utf-8"))["texts"]
    lines = [json.dumps({"id": f"t{i}", "text": text[:300]}) for i, text in enumerate(texts[:12])]
    (folder / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    long = json.loads((data / "longtext_en.json").read_text(encoding="utf-8"))
    one = {key: long[key][:1] for key in ("ids", "texts", "prompts")}
    (folder / "long.json").write_text(json.dumps(one), encoding="utf-8")
    return folder


def settings(sources: Path, out: Path, **trained: object) -> dict[str, object]:
    """A run file's content: the smallest that runs every stage."""
    return {
        "name": "tiny",
        "base": str(sources / "base"),
        "out": str(out),
        "data": [str(sources / "texts.jsonl")],
        "long_data": [str(sources / "long.json")],
        "export": {"type": "f32"},
        "quantize": {"types": ["Q8_0", "Q5_1"], "threads": 1},
        "calibrate": {"allow_small": True, "resamples": 100, "png": False},
        "calibrate_type": "Q8_0",
        "qc": {"max_tokens": 400, "resamples": 100, "compute_dtype": "float64"},
        "choose": {"repeats": 1},
        "longtext": {"min_tokens": 256, "max_new_tokens": 8, "resamples": 100, "png": False},
        **trained,
    }


def run_file(sources: Path, folder: Path, **trained: object) -> Path:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(settings(sources, folder / "out", **trained)))
    return file


def records(out: Path) -> dict[str, Record]:
    return {stage: read_record(out / stage / "record.json") for stage in STAGES}


def value(record: Record, check: str, subject: str | None = None) -> float:
    found = record.check(check, subject).value
    assert found is not None
    return found


@pytest.fixture(scope="module")
def finished(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, by its file: gates in front of two adapters (shared: copy before editing)."""
    folder = tmp_path_factory.mktemp("finished")
    beside = {"adapters": [str(sources / "first"), str(sources / "second")]}
    gates = str(sources / "gates.safetensors")
    file = run_file(sources, folder, rotations=gates, rotation_options=beside)
    result = CliRunner().invoke(app, ["run", str(file)])
    assert result.exit_code == 0, result.output
    return folder / "out"


def test_every_stage_judges_the_trained_model(finished: Path) -> None:
    found = records(finished)
    assert {record.verdict for record in found.values()} == {Verdict.PASS}
    qc = found["qc"]
    # float64 from float32 storage against PEFT's own forward in float64
    assert value(qc, "kl.mean", "baked_model") < 1e-10
    assert value(qc, "kl.mean", "tiny-F32.gguf") < 1e-6  # libllama's arithmetic
    assert 1e-8 < value(qc, "kl.mean", "tiny-Q8_0.gguf") < value(qc, "kl.mean", "tiny-Q5_1.gguf")
    assert value(qc, "effect.kl") > 1e-2
    rows: Any = found["choose"].metrics["rows"]
    for name in ("Q8_0", "Q5_1"):
        assert rows[name]["kl_mean"] == pytest.approx(value(qc, "kl.mean", f"tiny-{name}.gguf"))
        assert rows[name]["survives"]
    cases: Any = found["longtext"].metrics["cases"]
    assert {case["kl_mean"] < 1e-8 for case in cases.values()} == {True}
    applied: Any = found["bake"].metrics["adapters"]
    assert [one["kind"] for one in applied] == ["LORA", "LORA"]


def test_the_temperature_is_that_of_the_merged_file(finished: Path) -> None:
    """Fitted on the quantized file, beside the exported one: both hold the adapters."""
    said = json.loads((finished / "calibrate" / "temperature_config.json").read_text())
    assert 0.5 <= said["temperature"] <= 3.0
    exported = records(finished)["calibrate"].inputs["reference"]
    assert exported.sha256 == sha256_file(finished / "export" / "tiny-F32.gguf")


def test_a_changed_adapter_makes_the_run_again(
    sources: Path, finished: Path, tmp_path: Path
) -> None:
    lora = tmp_path / "lora"
    shutil.copytree(sources / "first", lora)
    config = RunConfig.model_validate(settings(sources, tmp_path / "out", rotations=str(lora)))
    once = run(config, only="bake")
    assert not once.metrics["stages"]["bake"]["reused"]  # type: ignore[index,call-overload]
    again = run(config)
    stages: Any = again.metrics["stages"]
    assert [name for name, row in stages.items() if row["reused"]] == ["bake"]
    assert again.verdict is Verdict.PASS
    adapter(sources / "base", lora, "lora", seed=7)
    stages = run(config).metrics["stages"]
    assert not any(row["reused"] for row in stages.values())


@pytest.mark.parametrize(
    ("rotations", "adapters"),
    [(None, ("first",)), ("first", ("second",)), ("oft", ("first",)), ("waveft", ("miss",))],
    ids=["adapter alone", "two in order", "rotations of OFT, then LoRA", "methods of other kinds"],
)
def test_adapters_given_in_other_ways(
    rotations: str | None, adapters: tuple[str, ...], sources: Path, tmp_path: Path
) -> None:
    beside = {"adapters": [str(sources / name) for name in adapters]}
    trained: dict[str, object] = {"rotation_options": beside}
    if rotations is not None:
        trained["rotations"] = str(sources / rotations)
    file = run_file(sources, tmp_path, **trained)
    assert CliRunner().invoke(app, ["run", str(file)]).exit_code == 0
    qc = records(tmp_path / "out")["qc"]
    assert value(qc, "kl.mean", "baked_model") < 1e-10
    assert value(qc, "effect.kl") > 1e-2


def test_a_bake_that_is_told_less_than_was_trained_fails(sources: Path, tmp_path: Path) -> None:
    """The reference is the trained model, whatever the bake is told."""
    beside = {"adapters": [str(sources / "first"), str(sources / "second")]}
    config = RunConfig.model_validate(
        settings(sources, tmp_path, rotation_options=beside)
        | {"bake": {"adapters": [str(sources / "first")]}}
    )
    for stage in ("bake", "export", "quantize"):
        run(config, only=stage)
    record = run(config, only="qc")
    assert record.verdict is Verdict.FAIL
    assert value(record, "kl.mean", "baked_model") > 1e-3
    assert "part_missing" in [found.code for found in record.diagnosis]


def test_choose_by_itself_takes_adapters(sources: Path, finished: Path, tmp_path: Path) -> None:
    arguments = [
        "choose", finished / "export" / "tiny-F32.gguf", "--reference", sources / "base",
        "--rotations", sources / "gates.safetensors", "--adapter", sources / "first",
        "--adapter", sources / "second", "--data", sources / "texts.jsonl", "--max-tokens", "400",
        "--type", "Q8_0", "--type", "Q5_1", "--set", "repeats=1", "--set", "resamples=100",
        "--out", tmp_path / "choose",
    ]  # fmt: skip
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    record = read_record(tmp_path / "choose" / "record.json")
    rows: Any = record.metrics["rows"]
    judged = records(finished)["qc"]
    for name in ("Q8_0", "Q5_1"):  # the same reference as in qc, but in float32
        assert rows[name]["kl_mean"] == pytest.approx(
            value(judged, "kl.mean", f"tiny-{name}.gguf"), rel=1e-2
        )
    assert value(record, "effect.kl") > 1e-2


@pytest.fixture
def attested(finished: Path, tmp_path: Path) -> Path:
    """The statement of the finished run, shipped alone."""
    statement = tmp_path / "shipped" / "attestation.json"
    statement.parent.mkdir()
    assert attest(AttestConfig(directory=finished, out=statement)).verdict is Verdict.PASS
    return statement


def links(record: Record) -> dict[str, str]:
    found: Any = record.metrics["links"]
    return {name: link["found"] for name, link in found.items()}


def verified(statement: Path, sources: Path, *adapters: Path, level: str = "full") -> Record:
    return verify_statement(
        VerifyConfig(
            file=statement,
            base=sources / "base",
            rotations=sources / "gates.safetensors",
            adapters=adapters,
            level=level,  # type: ignore[arg-type]
        )
    )


def test_base_gates_and_adapters_make_every_file_again(
    attested: Path, sources: Path, tmp_path: Path
) -> None:
    """Byte for byte, wherever the adapters are now, and whatever lies beside their tensors."""
    moved = tmp_path / "elsewhere" / "one"
    shutil.copytree(sources / "first", moved)
    (moved / "README.md").write_text("another card")
    record = verified(attested, sources, moved, sources / "second")
    assert links(record)["bake"] == "identical"
    assert set(links(record).values()) == {"identical", "not checked"}  # a temperature is measured
    assert record.verdict is not Verdict.FAIL


def test_another_order_or_adapter_is_named(attested: Path, sources: Path, tmp_path: Path) -> None:
    record = verified(attested, sources, sources / "second", sources / "first")
    assert links(record)["bake"] == "different"
    detail = record.check("derivation.link", "bake").detail
    assert "adapter_1 and adapter_2 given here: not the stated one" in detail
    other = adapter(sources / "base", tmp_path / "other", "lora", seed=9)
    detail = verified(attested, sources, other, sources / "second").check(
        "derivation.link", "bake"
    ).detail  # fmt: skip
    assert "(adapter_1 given here: not the stated one)" in detail
    assert "q_proj" in detail


def test_missing_and_superfluous_adapters_are_told(attested: Path, sources: Path) -> None:
    record = verified(attested, sources, sources / "first")
    assert links(record)["bake"] == "not checked"
    assert "not here: adapter_2" in record.check("derivation.link", "bake").detail
    assert "--adapter" in record.check("derivation.link", "bake").detail
    three = (sources / "first", sources / "second", sources / "oft")
    with pytest.raises(InputError, match="3 adapters are given, the statement names 2"):
        verified(attested, sources, *three)


def test_a_statement_that_leaves_an_adapter_out_is_refused(attested: Path) -> None:
    content = json.loads(attested.read_text())
    link = content["predicate"]["links"][0]
    assert [entry["name"] for entry in link["inputs"]] == [
        "base", "rotations", "adapter_1", "adapter_2",
    ]  # fmt: skip
    link["inputs"].pop(2)
    content["predicate"]["seals"]["links"]["bake"] = sha256_json(link)
    attested.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    with pytest.raises(InputError, match="does not say all of its adapters"):
        read_statement(attested)


@pytest.mark.parametrize("how", ["rotations", "adapters"])
def test_an_adapter_alone_is_stated_as_it_was_given(
    how: str, sources: Path, tmp_path: Path
) -> None:
    lora = sources / "first"
    given: dict[str, object] = {"rotations": str(lora)}
    if how == "adapters":
        given = {"rotation_options": {"adapters": [str(lora)]}}
    run(RunConfig.model_validate(settings(sources, tmp_path / "out", **given)), only="bake")
    attest(AttestConfig(directory=tmp_path / "out"))
    options: list[object] = ["--rotations", lora] if how == "rotations" else ["--adapter", lora]
    arguments = ["verify", tmp_path / "out" / "attestation.json", "--base", sources / "base"]
    result = CliRunner().invoke(app, [*map(str, [*arguments, *options])])
    assert result.exit_code == 0, result.output
    assert "identical" in result.output
