"""A NaN or an infinity is found wherever it lies, and its tensor and index are named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from so8tqc.checkpoints.finite import first_non_finite
from so8tqc.checkpoints.safetensors_index import read_header
from so8tqc.config import BakeConfig, QCConfig
from so8tqc.errors import RotationError
from so8tqc.records import Verdict
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.read import read_rotations
from so8tqc.rotations.rotation_set import Target
from so8tqc.services.bake import bake
from so8tqc.services.qc.service import qc

O_PROJ = "model.layers.1.self_attn.o_proj.weight"
BAD = [float("nan"), float("inf"), float("-inf")]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 700),
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(BAD)), max_size=2),
    seed=st.integers(0, 1000),
)
def test_the_first_is_torchs_first(
    dtype: torch.dtype,
    rows: int,
    places: list[tuple[float, float]],
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Tensors of up to several pieces; largest and smallest numbers are none of these."""
    info = torch.finfo(dtype)
    values = torch.rand(rows, 1021, generator=torch.Generator().manual_seed(seed)).to(dtype)
    values[0, :4] = torch.tensor([info.max, info.min, info.tiny, -0.0], dtype=dtype)
    for place, value in places:
        values.view(-1)[int(place * values.numel())] = value
    path = tmp_path_factory.mktemp("finite") / "x.safetensors"
    save_file({"other": torch.ones(3), "x": values}, path)
    entry = next(entry for entry in read_header(path) if entry.name == "x")
    found = (~torch.isfinite(values)).nonzero()
    assert first_non_finite(entry) == (tuple(found[0].tolist()) if len(found) else None)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "model.norm.weight"])
def test_in_a_tensor_of_the_base_that_no_bake_touches(
    value: float, tensor: str, llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    base = spoilt(llama, tmp_path / "base", tensor, -1, value)
    record = bake(BakeConfig(base=base, rotations=make_gates(base), out=tmp_path / "out"))
    check = record.check("structure.finite")
    assert (record.verdict, check.value) == (Verdict.FAIL, 1)
    last = [n - 1 for n in load_file(base / "model.safetensors")[tensor].shape]
    assert f"{tensor}{last}" in check.detail


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("tensor", [O_PROJ, "model.layers.0.mlp.up_proj.weight"])
def test_in_a_candidate(
    value: float, tensor: str, llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    gates = make_gates(llama)
    bake(BakeConfig(base=llama, rotations=gates, out=tmp_path / "baked"))
    candidate = spoilt(tmp_path / "baked", tmp_path / "candidate", tensor, 64 * 3 + 5, value)
    record = qc(
        QCConfig(
            reference=llama,
            rotations=gates,
            candidates=(candidate,),
            level="files",
            out=tmp_path / "qc",
        )
    )
    check = record.check("algebra.finite" if tensor == O_PROJ else "structure.finite")
    assert (record.verdict, check.value) == (Verdict.FAIL, 1)
    assert tensor in check.detail
    assert "[3, 5]" in check.detail
    assert [diagnosis.code for diagnosis in record.diagnosis] == ["non_finite"]


@pytest.mark.parametrize("value", BAD)
def test_in_the_rotations(value: float, tmp_path: Path) -> None:
    theta = np.zeros((4, 8, 8), np.float32)
    theta[2, 5, 7] = value
    path = tmp_path / "gates.safetensors"
    write_native(
        path,
        {Target(0): np.zeros_like(theta), Target(1): theta},
        pet=None,
        parametrization=Parametrization.EXP,
        convention=Convention.COLUMN,
        site=Site.INPUT,
    )
    with pytest.raises(RotationError, match=r"layer 1 .*block 2 has a non-finite.*\[5, 7\]"):
        read_rotations(path)


def spoilt(model: Path, copy: Path, tensor: str, at: int, value: float) -> Path:
    """A copy of a model directory with one element of one tensor changed."""
    shutil.copytree(model, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors[tensor].view(-1)[at] = value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy
