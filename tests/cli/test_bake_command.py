"""``so8tqc bake`` and ``doctor`` on what trainings save: exit codes, and what is said first."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from so8tqc.cli.main import run as run_main
from trained_forms import thetas, trained_directory, wrapped_state

Capture = pytest.CaptureFixture[str]


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


@pytest.fixture
def base(make_model: Callable[..., Path]) -> Path:
    return make_model("mistral", "float32")


def test_a_bare_checkpoint_is_refused_with_its_readings(
    base: Path, tmp_path: Path, capfd: Capture
) -> None:
    gates = tmp_path / "g.pt"
    torch.save({f"model.layers.{i}.rotation_gate.theta": g for i, g in enumerate(thetas())}, gates)
    out = tmp_path / "baked"
    command = ["bake", str(base), str(gates), "--out", str(out)]
    assert run_main(command) == 2
    said = flat(capfd.readouterr().err)
    for words in (
        "--parametrization scaled-taylor:",
        "--convention row: the gate computes x_row·R",
        "--site output: the gate sits after the projection",
        "so8tqc identify",
        "what the training's forward computes",
        "what its bake script wrote",
    ):
        assert words in said
    for partly in (["--convention", "row"], ["--convention", "row", "--site", "input"]):
        assert run_main([*command, *partly]) == 2
        assert "nothing is assumed" in flat(capfd.readouterr().err)
    assert not out.exists()
    stated = ["--parametrization", "exp", "--convention", "row", "--site", "input"]
    assert run_main([*command, *stated]) == 0
    qc = ["qc", "--reference", str(base), "--rotations", str(gates), "--candidate", str(out)]
    assert run_main([*qc, "--out", str(tmp_path / "qc"), "--level", "files"]) == 2
    assert "nothing is assumed" in flat(capfd.readouterr().err)


def test_a_trained_directory_needs_no_second_argument(
    base: Path, tmp_path: Path, capfd: Capture
) -> None:
    trained = trained_directory(tmp_path / "trained", base, wrapped_state(base, thetas()), shards=2)
    assert run_main(["bake", str(trained), "--out", str(tmp_path / "baked"), "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert record["metrics"]["reading"]["recognised"].startswith("self_attn.base_attention")
    assert record["config"]["rotations"] == str(trained)
    config = tmp_path / "run.yaml"
    config.write_text(f"base: {trained}\nout: {tmp_path / 'run'}\n")
    assert run_main(["run", str(config), "--only", "bake", "--quiet"]) == 0
    assert (tmp_path / "run" / "bake" / "baked_model" / "so8tqc.json").is_file()


def test_doctor_says_first_what_it_is_and_what_is_missing(
    base: Path, tmp_path: Path, capfd: Capture
) -> None:
    trained = trained_directory(tmp_path / "trained", base, wrapped_state(base, thetas()))
    assert run_main(["doctor", str(trained), "--json"]) == 0
    first, second, third, *_ = json.loads(capfd.readouterr().out)
    assert first["value"].startswith("trained model directory, 3 gates beside 30 weights")
    assert "scaled-taylor" in second["value"]
    assert third["value"] == f"nothing: so8tqc bake {trained} --out DIR"
    bare = tmp_path / "g.pt"
    torch.save({f"layer_{i}": g for i, g in enumerate(thetas())}, bare)
    assert run_main(["doctor", str(bare), "--json"]) == 0
    first, second, third, *_ = json.loads(capfd.readouterr().out)
    assert first["value"] == "training checkpoint, 3 gates"
    assert second["value"].startswith("parametrization, convention, site: 16 readings")
    assert second["remedy"] == f"so8tqc identify BASE {bare}"
    assert "logits do not depend" in third["value"]
    off = tmp_path / "off.bin"
    torch.save({"so8_rotation_gate.theta": thetas()[0]}, off)
    assert run_main(["doctor", str(off)]) == 3
    assert "does not touch the logits" in flat(capfd.readouterr().err)
