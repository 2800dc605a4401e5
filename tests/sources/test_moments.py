"""Second moments of inputs, layer by layer, against hooks on the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from so8tqc.errors import ModelError
from so8tqc.sources.hf import HFModel
from so8tqc.sources.moments import HEAD, HELD_OUT, chunks_of, layer_moments

_CHUNKS = 9


def _chunks() -> tuple[npt.NDArray[np.int64], ...]:
    tokens = np.random.default_rng(0).integers(3, 500, 24 * _CHUNKS + 5)
    return chunks_of(tokens, 1, 24, None)


def _by_the_whole_model(model: HFModel, chunks: Any) -> dict[str, dict[str, np.ndarray]]:
    """Module → kept and held sums, of inputs that a forward of the whole model shows."""
    found: dict[str, dict[str, np.ndarray]] = {}
    held = "kept"

    def hook(name: str) -> Callable[[Any, Any], None]:
        def take(_module: Any, arguments: Any) -> None:
            x = arguments[0].reshape(-1, arguments[0].shape[-1]).double().numpy()
            entry = found.setdefault(
                name, {k: np.zeros((x.shape[1],) * 2) for k in ("kept", "held")}
            )
            entry[held] += x.T @ x

        return take

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.module.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.inference_mode():
        for number, chunk in enumerate(chunks):
            held = "held" if number % HELD_OUT == HELD_OUT - 1 else "kept"
            model.module(input_ids=torch.as_tensor(chunk)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("architecture", ["llama", "mistral", "phi3", "qwen2", "qwen3", "gemma3_text"])  # fmt: skip # noqa: E501
def test_moments_are_those_of_the_whole_model(
    architecture: str, make_model: Callable[..., Path]
) -> None:
    model = HFModel.load(make_model(architecture))
    chunks = _chunks()
    expected = _by_the_whole_model(model, chunks)
    seen = []
    for layer in layer_moments(model, chunks, wanted=lambda _: True):
        for moments in layer.moments:
            assert (moments.tokens, moments.held_tokens) == (24 * (_CHUNKS - 1), 24)
            for module in moments.modules:
                name = "lm_head" if module == HEAD else module
                seen.append(name)
                scale = np.abs(expected[name]["kept"]).max()
                for kind in ("kept", "held"):
                    np.testing.assert_allclose(
                        getattr(moments, kind), expected[name][kind], atol=1e-5 * scale
                    )
    assert sorted(seen) == sorted(expected)


def test_matrices_that_share_an_input_share_its_moments(llama: Path) -> None:
    (layer,) = layer_moments(HFModel.load(llama), _chunks(), wanted=lambda name: name == "1")
    names = [[m.rsplit(".", 1)[1] for m in moments.modules] for moments in layer.moments]
    assert names == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_layers_that_depend_on_one_another_otherwise_are_noticed(llama: Path) -> None:
    """A layer that knows how often it was called gives another state alone than in the model."""
    model = HFModel.load(llama)
    second, calls = model.module.get_decoder().layers[1], [0]

    def hook(_module: Any, _arguments: Any, output: Any) -> Any:
        calls[0] += 1
        if isinstance(output, tuple):
            return (output[0] * calls[0], *output[1:])
        return output * calls[0]

    second.register_forward_hook(hook)
    with pytest.raises(ModelError, match="one at a time"):
        list(layer_moments(model, _chunks(), wanted=lambda _: True))


def test_the_model_is_as_it_was_afterwards(llama: Path) -> None:
    model, chunks = HFModel.load(llama), _chunks()
    before = model.hidden(chunks[0])
    list(layer_moments(model, chunks, wanted=lambda _: True))
    torch.testing.assert_close(model.hidden(chunks[0]), before, rtol=0, atol=0)


def test_chunks_are_spread_over_the_text() -> None:
    tokens = np.arange(100)
    chunks = chunks_of(tokens, None, 10, 4)
    assert [int(chunk[0]) for chunk in chunks] == [0, 20, 50, 70]
    assert all(chunk.size == 10 for chunk in chunks)
    assert [int(chunk[0]) for chunk in chunks_of(tokens, 7, 30, None)] == [7, 7, 7]
    assert chunks_of(tokens, None, 101, 4) == ()
