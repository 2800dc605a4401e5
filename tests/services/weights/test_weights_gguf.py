"""What a GGUF's type explains of a weight's error, and which weights are found in a file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from so8tqc.checkpoints.plan import plan_bake
from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.gguf.file import open_gguf
from so8tqc.progress import SILENT
from so8tqc.records import Verdict
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.parametrization import rotation_blocks
from so8tqc.rotations.rotation_set import RotationSet, Target
from so8tqc.services.weights.gguf import error_limit, judge_gguf, stored_weights
from tiny_gguf import LAYERS, WIDTH, write_llama


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q5_1", "Q5_0", "Q4_0", "F16", "BF16", "F32"])
def test_a_type_explains_what_it_costs_and_not_many_times_that(kind: str) -> None:
    values = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    if kind == "Q6_K":  # gguf-py reads K-quants and does not write them
        assert error_limit(kind) == pytest.approx(3 * 2**-6)
        return
    type_ = gguf.GGMLQuantizationType[kind]
    stored = gguf.quants.dequantize(gguf.quants.quantize(values, type_), type_)
    error = np.linalg.norm(stored - values) / np.linalg.norm(values)
    assert error <= error_limit(kind)
    if kind.startswith("Q"):
        assert error_limit(kind) < 5 * error


def test_no_type_explains_half_of_a_weight() -> None:
    for kind in ("IQ1_S", "Q2_K", "TQ1_0", "unheard_of"):
        assert error_limit(kind) <= 0.5


def stored_name(layer: int) -> str:
    return f"blk.{layer}.attn_output.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The model directory of the tiny GGUF: its attention outputs alone."""
    file = open_gguf(write_llama(tmp_path / "base.gguf"))
    folder = tmp_path / "base"
    folder.mkdir()
    weights = {
        f"model.layers.{i}.self_attn.o_proj.weight": file.tensors[stored_name(i)].values()
        for i in range(LAYERS)
    }
    save_file(weights, str(folder / "model.safetensors"))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


ROTATIONS = RotationSet(
    {
        Target(i): rotation_blocks(
            0.3 * np.random.default_rng(i).normal(size=(WIDTH // 8, 8, 8)), Parametrization.EXP
        )
        for i in range(LAYERS)
    },
    Convention.COLUMN, Site.INPUT, Parametrization.EXP, "here",
)  # fmt: skip


def patched(source: Path, path: Path, change: object) -> Path:
    """The GGUF with its attention outputs folded by hand, in numpy."""
    content = bytearray(source.read_bytes())
    file = open_gguf(source)
    for i in range(LAYERS):
        tensor = file.tensors[stored_name(i)]
        new = change(i, tensor.values().astype(np.float64)).astype(np.float32)  # type: ignore[operator]
        content[tensor.offset : tensor.offset + tensor.bytes] = new.tobytes()
    path.write_bytes(content)
    return path


def dense(i: int) -> np.ndarray:
    big = np.zeros((WIDTH, WIDTH))
    for k, block in enumerate(ROTATIONS.blocks[Target(i)]):
        big[8 * k : 8 * k + 8, 8 * k : 8 * k + 8] = block
    return big


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda i, w: w @ dense(i), None),
        (lambda i, w: w, "not_baked"),
        (lambda i, w: w @ dense(i).T, "transposed"),
        (lambda i, w: w @ dense(i) @ dense(i), "double_baked"),
        (lambda i, w: w @ dense(1 - i), "layers_permuted"),
        (lambda i, w: np.random.default_rng(i).normal(size=w.shape), "foreign_edit"),
        (lambda i, w: w * np.nan, "non_finite"),
    ],
)
def test_the_nearest_hypothesis_names_what_was_folded(
    change: object, code: str | None, base: Path, tmp_path: Path
) -> None:
    path = patched(tmp_path / "base.gguf", tmp_path / "made.gguf", change)
    planned = plan_bake(open_checkpoint(base), ROTATIONS, dtype="keep", all_layers=True)
    checks, diagnosis, rows = judge_gguf(path, planned, ROTATIONS, "made", SILENT)
    assert [d.code for d in diagnosis] == ([code] if code else [])
    assert len(rows) == LAYERS
    nearest = next(check for check in checks if check.id == "algebra.nearest")
    assert nearest.verdict is (Verdict.FAIL if code else Verdict.PASS)
    assert nearest.value == (LAYERS if code else 0)
    if code == "not_baked":
        assert "so8tqc export" in diagnosis[0].remedy


def test_a_weight_of_another_shape_is_missing(base: Path, tmp_path: Path) -> None:
    planned = plan_bake(open_checkpoint(base), ROTATIONS, dtype="keep", all_layers=True)
    found, missing = stored_weights(open_gguf(tmp_path / "base.gguf"), planned)
    assert ([plan.site.target.layer for plan, *_ in found], missing) == ([0, 1], [])
    file = open_gguf(tmp_path / "base.gguf")
    del file.tensors["blk.1.attn_output.weight"]
    found, missing = stored_weights(file, planned)
    assert (len(found), missing) == (1, [1])
