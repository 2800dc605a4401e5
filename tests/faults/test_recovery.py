"""What weights of a real size tell: SmolLM2-135M's o_proj, 576×576 in bfloat16."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_bench import O_PROJ, dense
from safetensors.torch import save_file
from scipy.linalg import expm

from so8tqc.config import QCConfig
from so8tqc.errors import ConfigError
from so8tqc.records import Record, Verdict
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.read import read_rotations
from so8tqc.rotations.rotation_set import Target
from so8tqc.services.qc.service import qc

WIDTH, BLOCKS, LAYERS = 576, 72, 2

Fold = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def model(directory: Path, weights: dict[int, torch.Tensor]) -> Path:
    """A directory that holds attention output projections and nothing else."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tensors = {O_PROJ.format(i): w.to(torch.bfloat16).contiguous() for i, w in weights.items()}
    save_file(tensors, str(directory / "model.safetensors"))
    return directory


def base_weights() -> dict[int, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    shape = (WIDTH, WIDTH)
    return {i: (torch.randn(shape, generator=draw) * 0.1).bfloat16() for i in range(LAYERS)}


def gates(path: Path, sigma: float, parametrization: Parametrization = Parametrization.EXP) -> Path:
    """θ whose skew part A = θ − θᵀ has elements of standard deviation σ."""
    draw = np.random.default_rng(4)
    theta = {Target(i): draw.normal(size=(BLOCKS, 8, 8)) * sigma / 2**0.5 for i in range(LAYERS)}
    write_native(
        path,
        theta,
        parametrization=parametrization,
        convention=Convention.COLUMN,
        site=Site.INPUT,
        pet=None,
    )
    return path


def examined(tmp_path: Path, sigma: float, fold: Fold, **options: object) -> Record:
    """QC of a hand-made bake from the files alone; ``fold`` gets W and the dense exp(A)."""
    weights = base_weights()
    file = gates(tmp_path / "gates.safetensors", sigma)
    theta = read_rotations(file).theta
    baked = {}
    for i, w in weights.items():
        skew = theta[Target(i)] - theta[Target(i)].transpose(0, 2, 1)
        baked[i] = fold(w.double(), dense(np.stack([expm(a) for a in skew])))
    config = QCConfig(
        reference=model(tmp_path / "base", weights),
        rotations=file,
        level="files",
        candidates=(model(tmp_path / "model", baked),),
        out=tmp_path / "qc",
        **options,
    )  # type: ignore[arg-type]
    return qc(config)


def codes(record: Record) -> set[str]:
    return {diagnosis.code for diagnosis in record.diagnosis}


@pytest.mark.parametrize("sigma", [0.002, 0.02, 0.2])
def test_recovered_blocks_are_the_true_ones(sigma: float, tmp_path: Path) -> None:
    """Nobody says what was folded; the file written is a gate file like any other."""
    found = tmp_path / "found.safetensors"
    weights = base_weights()
    true = read_rotations(gates(tmp_path / "gates.safetensors", sigma))
    baked = {i: w.double() @ dense(true.blocks[Target(i)].copy()) for i, w in weights.items()}
    base, candidate = model(tmp_path / "base", weights), model(tmp_path / "model", baked)
    config = QCConfig(
        reference=base,
        candidates=(candidate,),
        level="files",
        out=tmp_path / "qc",
        save_recovered=found,
    )
    record = qc(config)
    assert record.check("rotation.recovered").verdict is Verdict.PASS
    assert record.outputs["recovered"].path == str(found)
    recovered = read_rotations(found)
    assert recovered.parametrization is Parametrization.MATRIX
    for target in true:
        distance = np.linalg.norm(recovered.blocks[target] - true.blocks[target], axis=(1, 2))
        assert 1e-6 < distance.max() <= 6e-5  # 4e-4 were asked for
    again = qc(
        QCConfig(
            reference=base,
            rotations=found,
            candidates=(candidate,),
            level="files",
            out=tmp_path / "qc",
        )
    )
    assert codes(again) == {"storage_rounding"}  # nearly the right ones, not the right ones
    assert "within" in again.diagnosis[0].text


def test_a_model_that_carries_no_rotation_of_the_base_is_told(tmp_path: Path) -> None:
    record = examined(
        tmp_path, 0.2, lambda w, r: w.flip(0), save_recovered=tmp_path / "found.safetensors"
    )
    check = record.check("rotation.recovered")
    assert check.verdict is Verdict.FAIL
    assert check.value > 100
    with pytest.raises(ConfigError, match="one candidate"):
        qc(
            QCConfig(
                reference=tmp_path / "base",
                candidates=(tmp_path / "base", tmp_path / "model"),
                level="files",
                out=tmp_path / "qc",
                save_recovered=tmp_path / "f.safetensors",
            )
        )


def test_one_small_element_is_not_taken_for_rounding(tmp_path: Path) -> None:
    def edit(w: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        value = w @ r
        value[17, 30] += 0.05
        return value

    record = examined(tmp_path, 0.02, edit)
    assert codes(record) == {"foreign_edit"}
    assert "row(s) 17 of 576 were changed" in record.diagnosis[0].text


@pytest.mark.parametrize(
    ("code", "fold"),
    [
        ("transposed", lambda w, r: w @ r.T),
        ("double_baked", lambda w, r: w @ r @ r),
        ("not_baked", lambda w, r: w),
        ("blocks_permuted", lambda w, r: w @ torch.roll(r, (8, 8), (0, 1))),
        ("wrong_site", lambda w, r: r @ w),
        ("foreign_edit", lambda w, r: w * (1 + 0.005 * torch.sin(w * 1e6))),
        ("storage_rounding", lambda w, r: (w.float() @ r.bfloat16().float()).double()),
    ],
)
def test_small_gates_are_told_apart(code: str, fold: Fold, tmp_path: Path) -> None:
    record = examined(tmp_path, 0.002, fold)
    assert record.verdict is Verdict.FAIL
    assert codes(record) == {code}


def test_exp_and_cayley_are_told_apart_at_small_angles(tmp_path: Path) -> None:
    """The two differ by A³/12, about 1e-4 of a block at σ = 0.02."""

    def cayley(w: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        file = gates(tmp_path / "cayley.safetensors", 0.02, Parametrization.CAYLEY)
        blocks = read_rotations(file).blocks
        layer = next(i for i, base in base_weights().items() if torch.equal(base.double(), w))
        return w @ dense(blocks[Target(layer)].copy())

    record = examined(tmp_path, 0.02, cayley)
    assert codes(record) == {"wrong_parametrization"}
    assert "cayley" in record.diagnosis[0].text


def test_a_float32_product_is_rounding_and_says_so(tmp_path: Path) -> None:
    record = examined(tmp_path, 0.2, lambda w, r: (w.float() @ r.float()).double())
    assert codes(record) == {"storage_rounding"}
    assert "float32" in record.diagnosis[0].text


def test_below_what_storage_tells_apart_it_says_so(tmp_path: Path) -> None:
    """At σ = 1e-8 R, Rᵀ and no rotation give the same bfloat16 numbers."""
    record = examined(tmp_path, 1e-8, lambda w, r: w)
    assert record.check("algebra.effect").verdict is Verdict.FAIL
    assert codes(record) == {"storage_rounding"}
    assert "cannot tell it from: the weight is the base's" in record.diagnosis[0].text
