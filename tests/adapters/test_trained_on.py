"""Adapters that were trained on a quantized base: the reference runs on its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
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


def packed_rows(values: torch.Tensor) -> torch.Tensor:
    """[8·n, m] integers below 16 → [n, m] words, the first row in the lowest bits."""
    parts = values.to(torch.int64).reshape(-1, 8, values.shape[1])
    words = sum(parts[:, i] << (4 * i) for i in range(8))
    assert isinstance(words, torch.Tensor)
    return (words - ((words >> 31) << 32)).to(torch.int32).contiguous()


def gptq_base(base: Path, directory: Path, group: int = 16) -> dict[str, torch.Tensor]:
    """A GPTQ checkpoint whose norms differ from the base's, too; returns what everything is."""
    shutil.copytree(base, directory)
    tensors = load_file(str(base / "model.safetensors"))
    means = {}
    for name in list(tensors):
        value = tensors[name]
        if ".layers." not in name or value.ndim != 2:
            tensors[name] = means[name] = (value.float() * 1.25).to(value.dtype)
            continue
        w = tensors.pop(name).float().T  # [in, out]
        blocks = w.reshape(-1, group, w.shape[1])
        scales = ((blocks.amax(1) - blocks.amin(1)) / 15).half()
        zeros = (-blocks.amin(1) / scales.float()).round().clamp(1, 15)
        q = (blocks / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 15)
        means[name] = ((q - zeros[:, None]) * scales.float()[:, None]).half().float()
        means[name] = means[name].reshape(w.shape).T.contiguous()
        module = name.removesuffix(".weight")
        tensors[f"{module}.qweight"] = packed_rows(q.reshape(w.shape))
        tensors[f"{module}.qzeros"] = packed_rows((zeros - 1).T).T.contiguous()
        tensors[f"{module}.scales"] = scales
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": group}
    (directory / "config.json").write_text(json.dumps(config))
    return means


def test_everything_is_taken_from_a_quantized_directory(make_model, tmp_path: Path) -> None:
    """Not the matrices alone: quantizers move scales into norms and biases."""
    base = make_model("llama", "bfloat16")
    means = gptq_base(base, tmp_path / "gptq")
    with base_of_training(base, str(tmp_path / "gptq")) as directory:
        got = load_file(str(directory / "model.safetensors"))
        assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    assert got.keys() == means.keys() == load_file(str(base / "model.safetensors")).keys()
    for name, value in means.items():
        assert torch.equal(got[name].float(), value.float()), name


def test_qc_runs_on_a_quantized_directory(make_model, texts_file: Path, tmp_path: Path) -> None:
    base = make_model("llama", "bfloat16")
    gptq_base(base, tmp_path / "gptq")
    directory = adapter(base, tmp_path / "a", "lora")
    bake(BakeConfig(base=base, rotations=directory, out=tmp_path / "m"))
    record = qc(
        QCConfig(
            reference=base, rotations=directory, candidates=(tmp_path / "m",),
            data=(str(texts_file),), max_tokens=32, out=tmp_path / "q",
            trained_on=str(tmp_path / "gptq"),
        )
    )  # fmt: skip
    assert any("full-precision base changes" in notice for notice in record.notices)
    kl = next(c for c in record.checks if c.id == "kl.mean")
    assert kl.value is not None
    assert kl.value > 1e-3


def _config(**said: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        config["quantization_config"] = said or None
        (directory / "config.json").write_text(json.dumps(config))

    return change


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        held = load_file(str(directory / "model.safetensors"))
        change(held)
        save_file(held, str(directory / "model.safetensors"), metadata={"format": "pt"})

    return apply


MODULE = MATRIX.removesuffix(".weight")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_config(quant_method="hqq", quant_config={"weight_quant_params": {"nbits": 4}}),
         ["HQQ 4-bit", "cannot be read as data"]),
        (_config(quant_method="quanto", weights="int4"), ["Quanto (int4)"]),
        (_config(), ["GPTQ or AWQ", "cannot be read as data"]),
        (_tensors(lambda t: t.pop(f"{MODULE}.qweight")), ["qweight is missing", MODULE]),
        (_tensors(lambda t: t.pop("model.norm.weight")), ["model.norm.weight"]),
        (_tensors(lambda t: t.pop(f"{MODULE}.scales")), ["scales is missing", MODULE]),
        (_tensors(lambda t: t.update({"model.norm.weight": torch.ones(8)})),
         ["model.norm.weight", "[8]", "[64]"]),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(
    change: Callable[[Path], None], words: list[str], make_model, tmp_path: Path
) -> None:
    base = make_model("llama", "bfloat16")
    gptq_base(base, tmp_path / "gptq")
    change(tmp_path / "gptq")
    with pytest.raises(ModelError) as caught, base_of_training(base, str(tmp_path / "gptq")):
        pass
    for word in words:
        assert word in str(caught.value)


def test_what_is_no_quantized_base(make_model) -> None:
    base = make_model("llama", "bfloat16")
    with pytest.raises(ConfigError, match="nf5"), base_of_training(base, "nf5"):
        pass
    with pytest.raises(ModelError, match="not quantized"), base_of_training(base, str(base)):
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
