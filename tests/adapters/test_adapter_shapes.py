"""The same adapter, as others save it: in a sub-folder, pickled, beside saved modules."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft_cases import adapter
from safetensors.torch import load_file

from so8tqc.config import BakeConfig
from so8tqc.services.bake import bake

METHODS: dict[str, dict[str, object]] = {
    "oft": {"use_cayley_neumann": False, "oft_block_size": 8, "r": 0},
    "oft-series": {"use_cayley_neumann": True, "oft_block_size": 8, "r": 0},
    "lora": {},
}


def in_a_folder(saved: Path, to: Path) -> Path:
    shutil.copytree(saved, to / "my adapter")
    return to


def pickled(saved: Path, to: Path) -> Path:
    shutil.copytree(saved, to)
    weights = to / "adapter_model.safetensors"
    torch.save(load_file(str(weights)), to / "adapter_model.bin")
    weights.unlink()
    return to


def pickled_in_a_folder(saved: Path, to: Path) -> Path:
    pickled(saved, to / "default")
    return to


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(str(directory / "model.safetensors"))


@pytest.mark.parametrize("shape", [in_a_folder, pickled, pickled_in_a_folder])
@pytest.mark.parametrize("method", METHODS)
def test_it_bakes_to_the_same_model(
    method: str,
    shape: Callable[[Path, Path], Path],
    make_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base = make_model("llama", "float32")
    kind = "lora" if method == "lora" else "oft"
    saved = adapter(base, tmp_path / "saved", kind, target_modules=["o_proj"], **METHODS[method])
    bake(BakeConfig(base=base, rotations=saved, out=tmp_path / "usual"))
    other = shape(saved, tmp_path / "other")
    record = bake(BakeConfig(base=base, rotations=other, out=tmp_path / "baked"))
    assert record.verdict == "pass"
    usual, found = tensors(tmp_path / "usual"), tensors(tmp_path / "baked")
    assert usual.keys() == found.keys()
    changed = [name for name in usual if not torch.equal(usual[name], tensors(base)[name])]
    assert len(changed) == 3  # o_proj of each layer: the adapter was applied at all
    for name in usual:
        assert torch.equal(usual[name], found[name]), name
    if shape is not pickled:
        assert any("was found in" in notice for notice in record.notices)


@pytest.mark.parametrize("method", METHODS)
def test_modules_that_were_trained_whole_are_taken_over(
    method: str, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_model("qwen2", "float32")
    kind = "lora" if method == "lora" else "oft"
    saved = adapter(
        base,
        tmp_path / "saved",
        kind,
        target_modules=["o_proj"],
        modules_to_save=["lm_head"],
        **METHODS[method],
    )
    record = bake(BakeConfig(base=base, rotations=saved, out=tmp_path / "baked"))
    assert record.verdict == "pass"
    stored = load_file(str(saved / "adapter_model.safetensors"))
    (head,) = [tensor for name, tensor in stored.items() if "lm_head" in name]
    assert torch.equal(tensors(tmp_path / "baked")["lm_head.weight"], head)
