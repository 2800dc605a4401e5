"""Attention entropy: the same outputs as transformers' own attention, whatever the mask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from so8tqc.sources import attention
from so8tqc.sources.attention import UnsupportedAttentionError, attention_entropy
from so8tqc.sources.hf import HFModel
from so8tqc.sources.probe import probe

TOKENS = np.random.default_rng(0).integers(3, 500, size=150)

# a window of 32 within 150 tokens and query blocks of 48: every kind of block occurs
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 32, "head_dim": 16, "attn_logit_softcapping": 5.0},
    "mistral": {"sliding_window": 32},
    # these two mask a window that they do not pass to their attention
    "phimoe": {"sliding_window": 32, "num_local_experts": 4},
    "qwen2_moe": {
        "use_sliding_window": True,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 4,
    },
    # attention sinks
    "gpt_oss": {"sliding_window": 32, "head_dim": 16, "num_local_experts": 4},
    # values narrower than keys
    "deepseek_v3": {
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 24,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 2,
    },
}


def _model(architecture: str, attention: str) -> HFModel:
    config = AutoConfig.for_model(
        architecture,
        **{
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **ARCHITECTURES[architecture],
        },
    )
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention
    )
    for parameter in module.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
    return HFModel(module, Path(architecture))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_and_entropies_are_those_of_eager_attention(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "QUERY_BLOCK", 48)
    model = _model(architecture, "eager")
    with torch.no_grad():
        plain = model.module(
            torch.from_numpy(TOKENS)[None], output_attentions=True, output_hidden_states=True
        )
    with attention_entropy(model) as collector:
        hidden = model.hidden(TOKENS)
    torch.testing.assert_close(hidden, plain.hidden_states[-1][0], atol=1e-4, rtol=1e-4)
    for layer, weights in enumerate(plain.attentions):
        expected = torch.special.entr(weights[0].double()).sum(-1)
        np.testing.assert_allclose(collector.layers[layer], expected, atol=1e-4)
    assert collector.array().shape == (2, 4, TOKENS.size)


def test_no_more_than_a_block_of_scores_is_kept(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest tensor made inside the attention has block × T columns, not T × T."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 16)
    heights: list[int] = []
    rows = attention._Mask.rows

    def watched(mask: Any, start: int, stop: int, keys: int, device: torch.device) -> torch.Tensor:
        result = rows(mask, start, stop, keys, device)
        heights.append(result.shape[0])
        return result

    monkeypatch.setattr(attention._Mask, "rows", watched)
    model = HFModel.load(make_model("llama"))
    with attention_entropy(model):
        model.hidden(TOKENS)
    assert max(heights) == 16
    assert len(heights) == 3 * -(-TOKENS.size // 16)


def test_an_attention_that_shows_late_that_it_is_unknown_is_run_as_it_is(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = HFModel.load(make_model("llama"))
    plain = model.hidden(TOKENS)
    monkeypatch.setattr(attention, "_describe_mask", lambda *_args, **_options: None)
    with pytest.raises(UnsupportedAttentionError), attention_entropy(model):
        model.hidden(TOKENS)
    result = probe(model, TOKENS)
    assert result.entropy is None
    torch.testing.assert_close(result.hidden, plain)
    assert result.energy.shape == (3,)
