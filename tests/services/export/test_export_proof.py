"""What the export proof accepts, and what it must not."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from so8tqc.checkpoints.safetensors_index import Checkpoint, open_checkpoint
from so8tqc.gguf.file import open_gguf
from so8tqc.records import Verdict
from so8tqc.services.export.proof import TensorComparison, compare_tensors, proof_checks

HEADS, WIDTH, EXPERTS = 2, 16, 3


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row by row what llama.cpp's NORM rope needs: an oracle without reshapes."""
    size = rows.shape[0] // heads
    order = [
        h * size + i + half * size // 2
        for h in range(heads)
        for i in range(size // 2)
        for half in (0, 1)
    ]
    return rows[order]


def write_pair(
    directory: Path, architecture: str = "llama", **replace: np.ndarray
) -> tuple[Checkpoint, Path]:
    """A one-layer checkpoint and the GGUF a right converter makes of it, but for ``replace``."""
    make = np.random.default_rng(0).normal
    names = {
        "self_attn.q_proj.weight": ("attn_q", make(size=(WIDTH, WIDTH))),
        "self_attn.o_proj.weight": ("attn_output", make(size=(WIDTH, WIDTH))),
        "input_layernorm.weight": ("attn_norm", make(size=WIDTH)),
    }
    for expert in range(EXPERTS):
        names[f"block_sparse_moe.experts.{expert}.w1.weight"] = (
            "ffn_gate_exps",
            make(size=(8, WIDTH)),
        )
    source = {f"model.layers.0.{n}": v.astype(np.float32) for n, (_, v) in names.items()}
    save_file(source, str(directory / "model.safetensors"))
    config = {"num_hidden_layers": 1, "num_attention_heads": HEADS, "model_type": architecture}
    (directory / "config.json").write_text(json.dumps(config))

    stored: dict[str, np.ndarray] = {}
    experts = []
    for name, (short, values) in names.items():
        values = values.astype(np.float32)
        if ".experts." in name:
            experts.append(values)
        elif short == "attn_q" and architecture == "llama":
            stored[short] = permuted(values, HEADS)
        else:
            stored[short] = values
    stored["ffn_gate_exps"] = np.stack(experts)
    path = directory / "model.gguf"
    writer = gguf.GGUFWriter(str(path), architecture)
    for short, values in (stored | replace).items():
        kind = np.float16 if values.ndim > 1 else np.float32
        writer.add_tensor(f"blk.0.{short}.weight", np.ascontiguousarray(values.astype(kind)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_checkpoint(directory), path


def source_values(directory: Path, name: str) -> np.ndarray:
    return load_file(str(directory / "model.safetensors"))[f"model.layers.0.{name}"]


def compared(pair: tuple[Checkpoint, Path]) -> TensorComparison:
    return compare_tensors(pair[0], open_gguf(pair[1]))


def test_a_right_file_is_explained_tensor_by_tensor(tmp_path: Path) -> None:
    found = compared(write_pair(tmp_path))
    assert found.different == found.missing == found.extra == found.unmapped == []
    assert found.arrangements == {"rope rows interleaved": 1, "unchanged": 2 + EXPERTS}
    assert {c.verdict for c in proof_checks(found)} == {Verdict.PASS}


@pytest.mark.parametrize("fault", ["q in transformers' order", "one added", "transposed"])
def test_an_arrangement_that_is_wrong_for_the_architecture_is_different(
    fault: str, tmp_path: Path
) -> None:
    """The same values in another order: each of these is right for some other model."""
    write_pair(tmp_path)
    wrong = {
        "q in transformers' order": ("self_attn.q_proj.weight", "attn_q", lambda v: v),
        "one added": ("input_layernorm.weight", "attn_norm", lambda v: v + 1),
        "transposed": ("self_attn.o_proj.weight", "attn_output", lambda v: v.T),
    }
    name, short, change = wrong[fault]
    values = change(source_values(tmp_path, name))
    found = compared(write_pair(tmp_path, **{short: values}))
    assert found.different == [f"model.layers.0.{name}"]
    assert proof_checks(found)[0].verdict is Verdict.FAIL


def test_exchanged_experts_are_different(tmp_path: Path) -> None:
    write_pair(tmp_path)
    name = "block_sparse_moe.experts.{}.w1.weight"
    stack = np.stack([source_values(tmp_path, name.format(e)) for e in (0, 2, 1)])
    found = compared(write_pair(tmp_path, ffn_gate_exps=stack))
    assert found.different == [f"model.layers.0.{name.format(e)}" for e in (1, 2)]


def test_a_lost_expert_makes_all_of_its_stack_different(tmp_path: Path) -> None:
    write_pair(tmp_path)
    stack = np.stack(
        [source_values(tmp_path, f"block_sparse_moe.experts.{e}.w1.weight") for e in (0, 1)]
    )
    assert len(compared(write_pair(tmp_path, ffn_gate_exps=stack)).different) == EXPERTS


def test_an_architecture_whose_layout_is_unknown_is_a_skip_never_silence(tmp_path: Path) -> None:
    found = compared(write_pair(tmp_path, "orion"))
    assert found.different == []
    check = next(c for c in proof_checks(found) if c.id == "export.layout")
    assert check.verdict is Verdict.SKIP
    assert "'orion'" in check.detail


def test_an_added_tensor_fails_and_a_dropped_one_is_missing(tmp_path: Path) -> None:
    found = compared(write_pair(tmp_path, ffn_up=np.ones((4, 4), dtype=np.float32)))
    assert found.extra == ["blk.0.ffn_up.weight"]
    tensors = load_file(str(tmp_path / "model.safetensors"))
    tensors["model.layers.0.self_attn.v_proj.weight"] = np.ones((4, 4), dtype=np.float32)
    save_file(tensors, str(tmp_path / "model.safetensors"))
    found = compare_tensors(open_checkpoint(tmp_path), open_gguf(tmp_path / "model.gguf"))
    assert found.missing == ["model.layers.0.self_attn.v_proj.weight"]


def test_an_added_tensor_is_excused_only_by_an_unknown_source_of_its_layer(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, ffn_up=np.ones((4, 4), dtype=np.float32))
    tensors = load_file(str(tmp_path / "model.safetensors"))
    for name, excused in (
        ("model.layers.1.mlp.fused_odd.weight", False),
        ("visual.layers.0.mlp.fused_odd.weight", False),
        ("model.layers.0.mlp.fused_odd.weight", True),
    ):
        odd = {name: np.ones((4, 4), dtype=np.float32)}
        save_file(tensors | odd, str(tmp_path / "model.safetensors"))
        found = compare_tensors(open_checkpoint(tmp_path), open_gguf(pair[1]))
        assert found.unmapped == [name]
        assert (found.unattributed == ["blk.0.ffn_up.weight"]) is excused
        assert (found.extra == ["blk.0.ffn_up.weight"]) is not excused
