"""Adapters that were trained on a quantized base: the reference runs on its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft_cases import adapter
from safetensors.torch import load_file, save_file

from so8tqc.config import BakeConfig, QCConfig
from so8tqc.errors import ConfigError, ModelError
from so8tqc.services.bake import bake
from so8tqc.services.qc.service import qc
from so8tqc.services.qc.trained_on import base_of_training
from so8tqc.services.weights.quantizers import NF4

MATRIX = "model.layers.1.mlp.down_proj.weight"


def test_nf4_is_made_again(make_model) -> None:
    base = make_model("llama", "bfloat16")
    before = load_file(str(base / "model.safetensors"))
    with base_of_training(base, "nf4") as directory:
        after = load_file(str(directory / "model.safetensors"))
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    w, got = before[MATRIX].float().reshape(-1, 64), after[MATRIX].reshape(-1, 64)
    levels = torch.tensor(NF4)
    for block, values in zip(w[:20], got[:20], strict=True):
        largest = block.abs().max()
        nearest = (block[:, None] / largest - levels[None]).abs().argmin(dim=1)
        torch.testing.assert_close(values, levels[nearest] * largest)


def fp8_base(base: Path, directory: Path) -> dict[str, torch.Tensor]:
    """A block-scaled FP8 checkpoint; returns what its matrices are."""
    shutil.copytree(base, directory)
    tensors, means = load_file(str(base / "model.safetensors")), {}
    for name in [n for n in tensors if ".layers." in n and tensors[n].ndim == 2]:
        w = tensors[name].float()
        rows, columns = w.shape
        scales = torch.full((-(-rows // 32), -(-columns // 32)), 1e-3) * (
            1 + torch.arange(-(-rows // 32))[:, None]
        )
        spread = scales.repeat_interleave(32, 0)[:rows].repeat_interleave(32, 1)[:, :columns]
        stored = (w / spread).clamp(-400, 400).to(torch.float8_e4m3fn)
        tensors[name], tensors[f"{name}_scale_inv"] = stored, scales
        means[name] = stored.float() * spread
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (directory / "config.json").write_text(json.dumps(config))
    return means


def test_fp8_block_scales_are_read(make_model, tmp_path: Path) -> None:
    base = make_model("llama", "bfloat16")
    means = fp8_base(base, tmp_path / "fp8")
    with base_of_training(base, str(tmp_path / "fp8")) as directory:
        got = load_file(str(directory / "model.safetensors"))
    assert len(means) == 21
    for name, value in means.items():
        torch.testing.assert_close(got[name], value)


def test_what_cannot_be_read_is_named(make_model, tmp_path: Path) -> None:
    base = make_model("llama", "bfloat16")
    other = tmp_path / "gptq"
    shutil.copytree(base, other)
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="GPTQ 4-bit"), base_of_training(base, str(other)):
        pass
    with pytest.raises(ConfigError, match="nf5"), base_of_training(base, "nf5"):
        pass


def test_qc_says_what_the_other_base_changes(make_model, texts_file: Path, tmp_path: Path) -> None:
    base = make_model("llama", "bfloat16")
    directory = adapter(base, tmp_path / "a", "lora")
    bake(BakeConfig(base=base, rotations=directory, out=tmp_path / "m"))
    common = {
        "reference": base,
        "rotations": directory,
        "candidates": (tmp_path / "m",),
        "data": (str(texts_file),),
        "max_tokens": 32,
    }
    record = qc(QCConfig(**common, out=tmp_path / "q1", trained_on="nf4"))
    (told,) = [n for n in record.notices if "full-precision base changes" in n]
    assert "nf4" in told
    plain = qc(QCConfig(**common, out=tmp_path / "q2"))
    kl = [next(c.value for c in r.checks if c.id == "kl.mean") for r in (record, plain)]
    assert kl[0] > 100 * kl[1]  # type: ignore[operator]
    with pytest.raises(ConfigError, match="adapters"):
        qc(QCConfig(reference=base, candidates=(base,), out=tmp_path / "q3", trained_on="nf4"))
