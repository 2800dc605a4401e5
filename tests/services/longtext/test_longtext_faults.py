"""Faults of known size, planted in a model after a correct bake: which check finds them.

The random weights give a KL of 5e-6 without a fault, as bfloat16 does on SmolLM2.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from so8tqc.config import BakeConfig, LongTextConfig
from so8tqc.records import Record, Verdict
from so8tqc.services.bake import bake
from so8tqc.services.longtext.service import longtext
from so8tqc.sources.hf import HFModel

TOKENS = 2048


def rotate_before_rope(module: Any, layer: int, angle: float) -> None:
    """Turn neighbouring features of every query and key alike, before RoPE turns others."""
    c, s = np.cos(angle), np.sin(angle)
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float32)

    def hook(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ij,...nj->...ni", turn, output.unflatten(-1, (-1, 2))).flatten(-2)

    for name in ("q_proj", "k_proj"):
        getattr(module.model.layers[layer].self_attn, name).register_forward_hook(hook)


def noise_in_one_layer(module: Any, layer: int, size: float) -> None:
    """Alternating noise: size × rms of the layer's output, its sign changing at every token."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        direction = torch.randn(h.shape[-1], generator=torch.Generator().manual_seed(0))
        signs = torch.where(torch.arange(h.shape[-2]) % 2 == 0, 1.0, -1.0)
        noisy = h + size * h.square().mean().sqrt() * signs[:, None] * direction
        return (noisy, *output[1:]) if isinstance(output, tuple) else noisy

    module.model.layers[layer].register_forward_hook(hook)


def offset_positions(module: Any, after: int, by: int) -> None:
    def hook(_module: Any, args: Any, kwargs: Any) -> Any:
        kwargs = dict(kwargs)
        if "position_ids" in kwargs:
            ids = kwargs["position_ids"]
            kwargs["position_ids"] = torch.where(ids > after, ids + by, ids)
        else:
            x, ids, *rest = args
            args = (x, torch.where(ids > after, ids + by, ids), *rest)
        return args, kwargs

    module.model.rotary_emb.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.fixture(scope="module")
def long_llama(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a context of 4,096."""
    directory = tmp_path_factory.mktemp("long") / "llama"
    shutil.copytree(make_model("llama"), directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return directory


@pytest.fixture
def judged(
    long_llama: Path,
    make_gates: Callable[..., Path],
    long_texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Record]:
    """Bake, plant a fault in the baked model when it is loaded, and judge it on one long text."""
    gates = make_gates(long_llama)
    bake(BakeConfig(base=long_llama, rotations=gates, out=tmp_path / "baked"))
    load = HFModel.load

    def run(fault: Callable[[Any], None] | None = None) -> Record:
        def loaded(path: Path, **options: Any) -> HFModel:
            model = load(path, **options)
            if fault is not None and path.name == "baked":
                fault(model.module)
            return model

        monkeypatch.setattr(HFModel, "load", loaded)
        return longtext(
            LongTextConfig(
                model=tmp_path / "baked",
                reference=long_llama,
                rotations=gates,
                data=(str(long_texts),),
                out=tmp_path / "out",
                min_tokens=TOKENS,
                max_new_tokens=0,
                png=False,
                resamples=500,
            )
        )

    return run


def failed(record: Record) -> set[str]:
    return {check.id for check in record.checks if check.verdict is Verdict.FAIL}


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_rotation_before_rope_is_found_in_its_layer(
    layer: int, judged: Callable[..., Record]
) -> None:
    """By 0.7 rad: without RoPE the scores would be the same, so no weight looks wrong."""
    record = judged(lambda module: rotate_before_rope(module, layer, 0.7))
    expected = {"phase.attention"} | ({"phase.layer0"} if layer == 0 else set())
    assert failed(record) == expected
    if layer > 0:
        assert f"in layer {layer}." in record.check("phase.attention").detail


@pytest.mark.parametrize("layer", [0, 2])
def test_noise_of_high_frequency_is_found_in_its_layer(
    layer: int, judged: Callable[..., Record]
) -> None:
    """A fifth of the layer's rms: 4 % of its energy, which alternation counts 16-fold in Δ²."""
    record = judged(lambda module: noise_in_one_layer(module, layer, 0.2))
    assert {"pet.energy", "pet.high_frequency"} <= failed(record)
    assert f"in layer {layer}." in record.check("pet.energy").detail
    assert "phase.layer0" not in failed(record)


def test_positions_that_jump_after_1500_tokens_are_found(judged: Callable[..., Record]) -> None:
    record = judged(lambda module: offset_positions(module, 1500, 8))
    assert {"phase.layer0", "phase.position"} <= failed(record)


def test_a_rope_base_that_is_five_per_cent_off_is_found(judged: Callable[..., Record]) -> None:
    """Wavelengths of pair i of d/2 grow by the factor 1.05^(2i/d)."""

    def change(module: Any) -> None:
        rotary = module.model.rotary_emb
        share = torch.arange(rotary.inv_freq.numel()) / rotary.inv_freq.numel()
        rotary.inv_freq = rotary.inv_freq * 1.05**-share

    record = judged(change)
    assert {"phase.layer0", "phase.attention"} <= failed(record)


def test_without_a_fault_nothing_fails(judged: Callable[..., Record]) -> None:
    assert failed(judged()) == set()
