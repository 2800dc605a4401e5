"""The whole chain on SmolLM2-135M. Minutes: `nox -s tests -- -m demo`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from so8tqc.cli.main import run as run_main
from so8tqc.sources.inputs.builtin import (
    DEMO_MODEL,
    DEMO_ROTATIONS,
    resolve_model,
    resolve_rotations,
)

pytestmark = [pytest.mark.demo, pytest.mark.llama]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    assert run_main(["demo", "--out", str(out), "--quiet"]) == 0
    return out


def checks(out: Path, stage: str) -> dict[tuple[str, str], dict[str, object]]:
    record = json.loads((out / stage / "record.json").read_text(encoding="utf-8"))
    return {(c["id"], c["subject"]): c for c in record["checks"]}


def test_the_numbers_are_those_to_be_expected(demo: Path) -> None:
    found = checks(demo, "qc")

    def value(check: str, subject: str = "") -> float:
        return float(found[(check, subject)]["value"])  # type: ignore[arg-type]

    assert value("algebra.exact", "baked_model") <= 0.5
    assert 1e-3 < value("effect.kl") < 0.5
    floor = float(found[("kl.mean", "baked_model")]["noise_floor"])  # type: ignore[arg-type]
    assert value("kl.mean", "baked_model") <= 2 * floor < 1e-4
    # F16 rounds less than bfloat16 storage already did
    assert value("kl.mean", "smollm2-135m-F16.gguf") < 5e-5
    assert value("kl.top1", "smollm2-135m-F16.gguf") > 0.995
    assert value("kl.mean", "smollm2-135m-Q8_0.gguf") < value("kl.mean", "smollm2-135m-Q5_K_M.gguf")
    temperature = json.loads((demo / "calibrate" / "temperature_config.json").read_text())
    assert temperature["significant"]
    assert 1.0 < temperature["temperature"] < 1.3
    assert temperature["after"]["ece"] < temperature["before"]["ece"]


def test_the_files_are_compared_and_one_is_recommended(demo: Path) -> None:
    record = json.loads((demo / "choose" / "record.json").read_text(encoding="utf-8"))
    rows = record["metrics"]["rows"]
    assert list(rows) == ["Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"]  # by size
    assert record["metrics"]["recommended"] == "Q6_K"
    assert all(row["survives"] for row in rows.values())
    # the weights come from a 4-bit file: the ladder is not monotone, and the report says so
    assert [i["larger"] for i in record["metrics"]["inversions"]] == ["Q5_K_M"]
    assert set(record["run"]["measured"]["speed"]["files"]) == set(rows)


def test_a_second_run_reuses_every_stage(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["demo", "--out", str(demo), "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["metrics"]["stages"]
    assert len(stages) == 7
    assert all(stage["reused"] for stage in stages.values())


def test_transposed_rotations_bake_and_fail_against_the_trained_gates(tmp_path: Path) -> None:
    base, gates = resolve_model(DEMO_MODEL), resolve_rotations(DEMO_ROTATIONS)
    baked = tmp_path / "baked"
    assert (
        run_main(
            ["bake", str(base), str(gates), "--convention", "row", "--out", str(baked), "--quiet"]
        )
        == 0
    )
    code = run_main(
        [
            "qc",
            "--reference",
            str(base),
            "--rotations",
            str(gates),
            "--candidate",
            str(baked),
            "--max-tokens",
            "32",
            "--out",
            str(tmp_path / "qc"),
            "--quiet",
        ]
    )
    assert code == 1
    record = json.loads((tmp_path / "qc" / "record.json").read_text())
    assert [d["code"] for d in record["diagnosis"]] == ["transposed"]
    assert record["diagnosis"][0]["layers"] == list(range(30))
