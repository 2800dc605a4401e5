"""Sensitivities against the KL that noise in a module's outputs really makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from so8tqc.sources.hf import HFModel
from so8tqc.sources.moments import HEAD
from so8tqc.sources.sensitivity import EMBEDDING, sensitivities
from wide_llama import write_wide

NOISE = 2e-3
DRAWS = 24


@pytest.fixture(scope="module")
def model(tokenizer_files: Path, tmp_path_factory: pytest.TempPathFactory) -> HFModel:
    return HFModel.load(write_wide(tmp_path_factory.mktemp("wide") / "model", tokenizer_files))


@pytest.fixture(scope="module")
def chunks() -> tuple[np.ndarray, ...]:
    draw = np.random.default_rng(2)
    return tuple(draw.integers(3, 512, 96) for _ in range(12))


@pytest.fixture(scope="module")
def found(model: HFModel, chunks: tuple[np.ndarray, ...]) -> dict[str, float]:
    return sensitivities(model, chunks)


def kl_of_noise(model: HFModel, chunks: tuple[np.ndarray, ...], place: torch.nn.Module) -> float:
    """Mean KL per token, float64, with independent noise in every output of a module."""
    draw = torch.Generator().manual_seed(1)

    def noisy(_module: object, _arguments: object, output: torch.Tensor) -> torch.Tensor:
        return output + NOISE * torch.randn(output.shape, generator=draw)

    def logits(chunk: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            found = model.module(input_ids=torch.from_numpy(chunk)[None]).logits[0]
        return torch.log_softmax(found.double(), -1)

    total = count = 0.0
    for chunk in chunks:
        exact = logits(chunk)
        handle = place.register_forward_hook(noisy)
        for _ in range(DRAWS // len(chunks)):
            total += float((exact.exp() * (exact - logits(chunk))).sum())
            count += len(chunk)
        handle.remove()
    return total / count


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.2.mlp.down_proj",
        HEAD,
        EMBEDDING,
    ],
)
def test_noise_costs_what_is_predicted(
    name: str, model: HFModel, chunks: tuple[np.ndarray, ...], found: dict[str, float]
) -> None:
    place = {
        HEAD: model.module.get_output_embeddings(),
        EMBEDDING: model.module.get_input_embeddings(),
    }.get(name) or model.module.get_submodule(name)
    width = place.embedding_dim if name == EMBEDDING else place.out_features
    predicted = found[name] * width * NOISE**2
    assert predicted == pytest.approx(kl_of_noise(model, chunks, place), rel=0.2)


def test_keys_and_values_have_what_enters_the_output_projection(
    model: HFModel, chunks: tuple[np.ndarray, ...], found: dict[str, float]
) -> None:
    """Noise in what attention puts out, before o_proj."""

    class Before(torch.nn.Module):
        def __init__(self, inside: torch.nn.Module) -> None:
            super().__init__()
            self.same = torch.nn.Identity()
            self.inside = inside

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.inside(self.same(x))
            return result

    attention = model.module.get_submodule("model.layers.1.self_attn")
    own = attention.o_proj
    attention.o_proj = Before(own)
    try:
        measured = kl_of_noise(model, chunks, attention.o_proj.same)
    finally:
        attention.o_proj = own
    for kind in ("k_proj", "v_proj"):
        predicted = found[f"model.layers.1.self_attn.{kind}"] * own.in_features * NOISE**2
        assert predicted == pytest.approx(measured, rel=0.2)


def test_weights_ask_for_gradients_as_before(model: HFModel, found: dict[str, float]) -> None:
    assert len(found) == 3 * 7 + 2
    assert all(parameter.requires_grad for parameter in model.module.parameters())
    assert all(parameter.grad is None for parameter in model.module.parameters())
    assert not any(m._forward_hooks for m in model.module.modules())
