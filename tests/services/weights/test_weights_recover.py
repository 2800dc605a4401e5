"""Rotations recovered from weights are those that were folded, and are written as gates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.config import BakeConfig
from so8tqc.errors import ModelError
from so8tqc.records import Verdict
from so8tqc.rotations.read import read_rotations
from so8tqc.services.bake import bake
from so8tqc.services.weights.recover import recover

O_PROJ = "model.layers.1.self_attn.o_proj.weight"


@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-5), ("keep", 5e-3)])
@pytest.mark.parametrize("told", [True, False])
def test_what_was_folded_is_found(
    dtype: str,
    near: float,
    told: bool,
    llama: Path,
    make_gates: Callable[..., Path],
    tmp_path: Path,
) -> None:
    gates = make_gates(llama)
    bake(BakeConfig(base=llama, rotations=gates, out=tmp_path / "baked", baked_dtype=dtype))
    trained = read_rotations(gates)
    out = tmp_path / "found.safetensors"
    expected = trained if told else None
    check, rows = recover(tmp_path / "baked", open_checkpoint(llama), expected, out, "baked")
    assert check.verdict is Verdict.PASS
    found = read_rotations(out)
    assert set(found) == set(trained)
    for target in trained:
        error = np.linalg.norm(found.blocks[target] - trained.blocks[target], axis=(1, 2))
        assert error.max() < near
        row = rows[f"{target}"]
        assert row["determinant"] == pytest.approx(1, abs=1e-3)
        if told:
            assert row["distance"] == pytest.approx(error.max(), rel=0.2, abs=1e-12)
        else:
            assert row["distance"] is None
    again = tmp_path / "again"
    bake(BakeConfig(base=llama, rotations=out, out=again, baked_dtype="float32"))
    one, other = (load_file(d / "model.safetensors")[O_PROJ] for d in (again, tmp_path / "baked"))
    assert torch.allclose(one, other.float(), atol=0.01)


def edited(tmp_path: Path, llama: Path, change: Callable[[torch.Tensor], object]) -> Path:
    folder = tmp_path / "edited"
    folder.mkdir()
    tensors = load_file(llama / "model.safetensors")
    change(tensors[O_PROJ])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((llama / "config.json").read_bytes())
    return folder


def test_what_no_rotation_explains_fails(llama: Path, tmp_path: Path) -> None:
    model = edited(tmp_path, llama, lambda w: w[:, :8].mul_(1.5))
    out = tmp_path / "found.safetensors"
    check, rows = recover(model, open_checkpoint(llama), None, out, "edited")
    assert check.verdict is Verdict.FAIL
    assert "layer 1" in check.detail
    assert max(rows, key=lambda name: rows[name]["residual"]) == "layer 1 attention output"


def test_a_nan_is_named_and_nothing_is_written(llama: Path, tmp_path: Path) -> None:
    model = edited(tmp_path, llama, lambda w: w[0, :1].fill_(torch.nan))
    out = tmp_path / "found.safetensors"
    with pytest.raises(ModelError, match=r"layers.1.* holds NaN"):
        recover(model, open_checkpoint(llama), None, out, "edited")
    assert not out.exists()
