"""What the text of a model class says of Conv1D, against the modules of models that are built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from so8tqc.checkpoints.class_source import rules_out_conv1d
from so8tqc.checkpoints.safetensors_index import Checkpoint

_SMALL = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def checkpoint(config: dict[str, Any]) -> Checkpoint:
    return Checkpoint(directory=Path("model"), tensors={}, files=(), config=config)


def config_of(kind: str, **more: object) -> dict[str, Any]:
    known = AutoConfig.for_model(kind, **{**_SMALL, **more})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(known)
    held = json.loads(known.to_json_string(use_diff=False))
    held["architectures"] = [type(model).__name__]
    held["conv1d"] = any(isinstance(module, Conv1D) for module in model.modules())
    return dict(held)


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        *((kind, True) for kind in ("llama", "mixtral", "qwen3_moe", "phi3", "olmo", "gpt_neox")),
        *((kind, False) for kind in ("gpt2", "openai-gpt")),
    ],
)
def test_the_source_says_what_the_modules_are(kind: str, answer: bool) -> None:
    config = config_of(kind)
    assert config["conv1d"] is not answer
    assert rules_out_conv1d(checkpoint(config)) is answer


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["GPT2LMHeadModel"]},  # defined elsewhere
        {"architectures": ["ACustomModel"]},
        {"architectures": "LlamaForCausalLM, GPT2LMHeadModel"},
        {"model_type": "never_heard_of"},
        {"model_type": "../gpt2"},
        {"model_type": None},
        {"model_type": 7},
    ],
)
def test_what_is_not_known_is_not_ruled_out(change: dict[str, object]) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    assert rules_out_conv1d(checkpoint(config))
    assert not rules_out_conv1d(checkpoint(config | change))


def test_a_tower_that_an_auto_class_makes_counts() -> None:
    """LLaVA's text model is whatever its config says."""
    config: dict[str, Any] = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": {"model_type": "siglip"},
    }
    assert rules_out_conv1d(checkpoint(config | {"text_config": {"model_type": "qwen2"}}))
    assert not rules_out_conv1d(checkpoint(config | {"text_config": {"model_type": "gpt2"}}))
    assert not rules_out_conv1d(checkpoint(config | {"text_config": {}}))
