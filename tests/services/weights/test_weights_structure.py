"""Evidence from the files: each edit fails its own check, and a right bake none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from so8tqc.checkpoints.plan import plan_bake
from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.config import BakeConfig
from so8tqc.records import Check, Verdict
from so8tqc.rotations.algebra import FoldComparison
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.read import read_rotations
from so8tqc.rotations.rotation_set import RotationSet, Target
from so8tqc.services.bake import bake
from so8tqc.services.weights.structure import (
    algebra,
    algebra_checks,
    effect_share,
    rotation_checks,
    rotation_rows,
    structure_checks,
)

O_PROJ = "model.layers.1.self_attn.o_proj.weight"
NORM = "model.norm.weight"

Files = tuple[Path, Path, Path]


@pytest.fixture
def files(llama: Path, make_gates: Callable[..., Path], tmp_path: Path) -> Files:
    """Base, gates, and a correct bake to be broken."""
    gates = make_gates(llama)
    bake(BakeConfig(base=llama, rotations=gates, out=tmp_path / "baked"))
    return llama, gates, tmp_path / "baked"


def judged(files: Files) -> list[Check]:
    base, gates, baked = files
    checkpoint, rotations = open_checkpoint(base), read_rotations(gates)
    planned = plan_bake(checkpoint, rotations, dtype="keep", all_layers=True)
    candidate = open_checkpoint(baked)
    checks = structure_checks(checkpoint, candidate, planned, "S")
    return [*checks, *algebra_checks(algebra(candidate, planned, rotations), "S")]


def failed(files: Files) -> list[str]:
    return [check.id for check in judged(files) if check.verdict is Verdict.FAIL]


def rewrite(files: Files, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = files[2] / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_right_bake_fails_nothing(files: Files) -> None:
    checks = judged(files)
    assert failed(files) == []
    assert {check.subject for check in checks} == {"S"}
    exact = next(check for check in checks if check.id == "algebra.exact")
    assert exact.value is not None
    assert 0 < exact.value <= 0.5


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda t: t.pop(NORM), ["structure.missing"]),
        (lambda t: t.update(more=torch.ones(2)), ["structure.added"]),
        (lambda t: t.update({"model.layers.0.rotation_gate.theta": torch.ones(2)}),
         ["structure.added", "structure.gates"]),
        (lambda t: t.update({NORM: torch.cat([t[NORM]] * 2)}), ["structure.shapes"]),
        (lambda t: t.update({NORM: t[NORM].float()}), ["structure.dtypes"]),
        (lambda t: t[NORM].view(torch.int16)[:1].add_(1), ["structure.untouched"]),
        (lambda t: t[NORM][3:4].fill_(torch.nan), ["structure.untouched", "structure.finite"]),
        (lambda t: t[O_PROJ].view(torch.int16)[0, :1].add_(1), ["algebra.exact"]),
        (lambda t: t[O_PROJ][5, 7:8].fill_(torch.inf),
         ["algebra.exact", "algebra.finite"]),
    ],
)  # fmt: skip
def test_an_edit_of_a_tensor_fails_its_own_check(
    change: Callable[[dict[str, torch.Tensor]], None], wanted: list[str], files: Files
) -> None:
    rewrite(files, change)
    assert failed(files) == wanted


def test_a_place_is_named_by_its_index(files: Files) -> None:
    rewrite(files, lambda t: t[NORM][3:4].fill_(torch.nan))
    rewrite(files, lambda t: t[O_PROJ][5, 7:8].fill_(torch.inf))
    told = {check.id: check.detail for check in judged(files)}
    assert f"{NORM}[3]" in told["structure.finite"]
    assert f"layer 1 ({O_PROJ}) at [5, 7]" in told["algebra.finite"]


def test_config_and_tokenizer_are_compared_as_values(files: Files) -> None:
    baked = files[2]
    config = json.loads((baked / "config.json").read_text())
    (baked / "config.json").write_text(json.dumps(config | {"transformers_version": "0"}))
    tokenizer = json.loads((baked / "tokenizer_config.json").read_text())
    (baked / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=7))
    assert failed(files) == []
    (baked / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert failed(files) == ["structure.config"]
    (baked / "config.json").write_text(json.dumps(config))
    (baked / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"more": 1}))
    assert failed(files) == ["structure.tokenizer"]
    (baked / "tokenizer_config.json").unlink()
    assert failed(files) == ["structure.tokenizer"]


@pytest.mark.parametrize(
    "name",
    [
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "processor_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates/tool_use.jinja",
    ],
)
def test_what_makes_input_of_pictures_and_conversations_comes_along_and_is_compared(
    name: str, llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    base, baked, gates = tmp_path / "base", tmp_path / "baked", make_gates(llama)
    shutil.copytree(llama, base)
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).write_text('{"image_mean": [0.5, 0.4, 0.3]}')
    bake(BakeConfig(base=base, rotations=gates, out=baked))
    assert (baked / name).read_bytes() == (base / name).read_bytes()
    assert failed((base, gates, baked)) == []
    (baked / name).write_text('{"image_mean": [0.4, 0.5, 0.3]}')
    assert failed((base, gates, baked)) == ["structure.processor"]
    (baked / name).unlink()
    assert failed((base, gates, baked)) == ["structure.processor"]


@pytest.mark.parametrize(
    ("expected", "made", "share"),
    [(0.2, 0.2, 1.0), (0.2, 0.1, 0.5), (0.0, 0.0, 1.0), (0.0, 0.1, float("inf")), (0.2, 0.0, 0.0)],
)
def test_the_share_of_the_change_that_was_made(expected: float, made: float, share: float) -> None:
    comparison = FoldComparison(0.0, 0.0, made, expected, 0)
    assert effect_share(comparison) == pytest.approx(share)


def rotations(blocks: np.ndarray) -> RotationSet:
    return RotationSet(
        {Target(4): blocks}, Convention.COLUMN, Site.INPUT, Parametrization.MATRIX, "here"
    )


def test_drift_and_angles_are_those_of_the_blocks() -> None:
    angle = 0.3
    turned = np.eye(8)
    turned[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    found = rotations(np.stack([turned, np.eye(8) * (1 + 1e-5)]))
    (row,) = rotation_rows(found)
    assert (row.layer, row.blocks) == (4, 2)
    assert row.angle_max == pytest.approx(angle, rel=1e-6)
    drift = np.linalg.norm(np.eye(8) * ((1 + 1e-5) ** 2 - 1))
    assert row.orthogonality_max == pytest.approx(drift, rel=1e-6)
    orthogonality, determinant = rotation_checks(found)
    assert orthogonality.value == pytest.approx(drift, rel=1e-6)
    assert "block 1" in orthogonality.detail
    assert determinant.value == pytest.approx((1 + 1e-5) ** 8 - 1, rel=1e-6)
