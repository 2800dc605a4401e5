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
from so8tqc.sources.attended import _key_costs, attention_told, watched
from so8tqc.sources.hf import HFModel
from so8tqc.sources.moments import HEAD, HELD_OUT, QUERY_STEP, chunks_of, layer_moments

_CHUNKS = 9


def _chunks() -> tuple[npt.NDArray[np.int64], ...]:
    tokens = np.random.default_rng(0).integers(3, 500, 24 * _CHUNKS + 5)
    return chunks_of(tokens, 1, 24, None)


def _by_the_whole_model(model: HFModel, chunks: Any) -> dict[str, dict[str, np.ndarray]]:
    """Module → kept and held sums, of inputs and attention that a forward of the whole model shows.

    The weights of attention are those that transformers' eager attention gives out.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    inputs: dict[str, npt.NDArray[np.float64]] = {}

    def hook(name: str) -> Callable[[Any, Any], None]:
        def take(_module: Any, arguments: Any) -> None:
            inputs[name] = arguments[0].reshape(-1, arguments[0].shape[-1]).double().numpy()

        return take

    linears = [n for n, m in model.module.named_modules() if isinstance(m, torch.nn.Linear)]
    handles = [
        model.module.get_submodule(name).register_forward_pre_hook(hook(name)) for name in linears
    ]
    for number, chunk in enumerate(chunks):
        ids = torch.as_tensor(chunk)[None]
        with torch.inference_mode():
            model.module.set_attn_implementation("eager")
            weights = model.module(input_ids=ids, use_cache=False, output_attentions=True)
            model.module.set_attn_implementation("sdpa")
            with attention_told(model), watched() as calls:
                model.module(input_ids=ids, use_cache=False)
        for name, x in inputs.items():
            layer = int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else -1
            if name.endswith(".v_proj"):
                means = weights.attentions[layer][0].double().numpy() @ x
                some = means[:, number % QUERY_STEP :: QUERY_STEP].reshape(-1, x.shape[1])
                product = some.T @ some * len(x) / len(some)
            elif name.endswith(".k_proj"):
                product = x.T @ (x * calls[layer].key_costs.numpy()[:, None])
            else:
                product = x.T @ x
            entry = found.setdefault(name, {k: np.zeros(product.shape) for k in ("kept", "held")})
            entry["held" if number % HELD_OUT == HELD_OUT - 1 else "kept"] += product
    for handle in handles:
        handle.remove()
    return found


def test_a_keys_cost_is_what_its_change_moves() -> None:
    """Σ over heads and queries of the squared derivative of attention's outputs by a key."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 6, width, generator=draw, dtype=torch.float64)
        for heads, width in ((4, 8), (2, 8), (2, 5))
    )

    def attend(keys: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, value, is_causal=True, scale=1.0, enable_gqa=True
        )

    weights = torch.nn.functional.scaled_dot_product_attention(
        query, key, torch.eye(6).double().expand(1, 2, 6, 6), is_causal=True, scale=1.0,
        enable_gqa=True,
    )  # fmt: skip
    found = _key_costs(query[0], value[0], attend(key)[0], weights[0])
    # by single heads, since a key that heads share is counted for each
    by_key = torch.zeros(6, dtype=torch.float64)
    for head in range(4):
        one = torch.autograd.functional.jacobian(lambda k, h=head: attend(k)[0, h], key)
        by_key += one[:, :, 0].square().sum(dim=(0, 1, 2, 4))
    torch.testing.assert_close(found, by_key)


def test_values_are_weighed_by_what_is_attended_to(llama: Path) -> None:
    """A change of values moves attention's outputs by what their moments say."""
    model = HFModel.load(llama)
    chunks = _chunks()[:QUERY_STEP]
    (layer,) = layer_moments(model, chunks, wanted=lambda name: name == "0")
    moments = next(m for m in layer.moments if m.modules[0].endswith(".v_proj"))
    attention = model.module.get_decoder().layers[0].self_attn
    heads, shared = model.config.num_attention_heads, model.config.num_key_value_heads
    rows, columns = attention.v_proj.weight.shape
    # the same for every head, since the moments are a mean over heads
    block = torch.randn(rows // shared, columns, generator=torch.Generator().manual_seed(1))
    outputs: list[torch.Tensor] = []
    handle = attention.o_proj.register_forward_pre_hook(lambda _, a: outputs.append(a[0][0]))
    for _ in range(2):
        for chunk in chunks:
            model.hidden(chunk)
        with torch.no_grad():
            attention.v_proj.weight += block.repeat(shared, 1)
    handle.remove()
    moved = (torch.stack(outputs[QUERY_STEP:]) - torch.stack(outputs[:QUERY_STEP])).double()
    some = torch.cat([x[n::QUERY_STEP] for n, x in enumerate(moved)])  # the queries looked at
    expected = np.einsum("ri,ij,rj->", block, moments.kept, block)
    np.testing.assert_allclose(float(some.square().sum()) * QUERY_STEP / heads, expected, rtol=1e-4)


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
        ["q_proj"],
        ["k_proj"],
        ["v_proj"],
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
