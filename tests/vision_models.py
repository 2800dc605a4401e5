"""Tiny random models that see, of seven types, each with a processor and a tokenizer of its own.

The processors' files are what transformers itself saves; nothing in them is made by hand but sizes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 640
"""Of the text models: the tokenizer's 512 pieces, the special tokens, and room."""

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e6}
_MEAN, _STD = [0.48, 0.45, 0.40], [0.26, 0.27, 0.28]

_QWEN = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def _template(image: str, turn: str) -> str:
    """A chat template that writes ``image`` for a picture and ``turn`` in front of a turn."""
    return (
        "{{ bos_token }}{% for message in messages %}{{ '" + turn + "' + message['role'] + ': ' }}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '" + image + "' }}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + turn + "assistant: ' }}{% endif %}"
    )


@dataclass(frozen=True)
class Kind:
    """How a type is built.

    Attributes:
        config: of the model; ``IDS`` are put in for the values that name a token.
        tokens: special tokens of pictures and turns, added to the tokenizer.
        template: of conversations.
        processor: its class, and options.
        image_processor: likewise.
        named: attributes of the tokenizer that name tokens.
    """

    config: Mapping[str, Any]
    tokens: tuple[str, ...]
    template: str
    processor: str
    image_processor: str
    image_options: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)


_QWEN_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_QWEN_IMAGES = {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "min_pixels": 28 * 28 * 4,
    "max_pixels": 28 * 28 * 16,
    "image_mean": _MEAN,
    "image_std": _STD,
}

KINDS: dict[str, Kind] = {
    "qwen2_vl": Kind(
        {
            "text_config": {**_TEXT, "rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}},
            "vision_config": {
                "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2,
            },
            **_QWEN_IDS,
        },
        _QWEN_TOKENS, _QWEN, "Qwen2VLProcessor", "qwen2_vl", _QWEN_IMAGES,
    ),
    "qwen2_5_vl": Kind(
        {
            "text_config": {**_TEXT, "rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}},
            "vision_config": {
                "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
                "out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 56,
            },
            **_QWEN_IDS,
        },
        _QWEN_TOKENS, _QWEN, "Qwen2_5_VLProcessor", "qwen2_vl", _QWEN_IMAGES,
    ),
    "qwen3_vl": Kind(
        {
            "text_config": {
                **_TEXT, "head_dim": 16,
                "rope_parameters": {**_ROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
            },
            "vision_config": {
                "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
                "out_hidden_size": 64, "deepstack_visual_indexes": [0, 1],
                "num_position_embeddings": 64, "patch_size": 16,
            },
            **_QWEN_IDS,
        },
        _QWEN_TOKENS, _QWEN, "Qwen3VLProcessor", "qwen2_vl",
        {**_QWEN_IMAGES, "patch_size": 16, "min_pixels": 32 * 32 * 4, "max_pixels": 32 * 32 * 16},
    ),
    "gemma3": Kind(
        {
            "text_config": {
                **_TEXT, "head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32,
                "tie_word_embeddings": True,
            },
            "vision_config": {
                "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
                "vision_use_head": False,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        ("<start_of_image>", "<end_of_image>", "<image_soft_token>", "<start_of_turn>"),
        _template("<start_of_image>", "<start_of_turn>"),
        "Gemma3Processor", "gemma3",
        {"size": {"height": 56, "width": 56}, "image_seq_length": 4, "image_mean": _MEAN,
         "image_std": _STD},
        {"image_seq_length": 4},
        {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>",
         "eoi_token": "<end_of_image>"},
    ),
    "mistral3": Kind(
        {
            "text_config": {**_TEXT, "model_type": "mistral", "head_dim": 16,
                            "sliding_window": None},
            "vision_config": {
                "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48,
                "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 112,
                "patch_size": 14, "hidden_act": "silu", "head_dim": 16,
            },
            "spatial_merge_size": 2,
            "image_token_index": "[IMG]",
            "tie_word_embeddings": False,
        },
        ("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]"),
        _template("[IMG]", "[INST]"),
        "PixtralProcessor", "pixtral",
        {"size": {"longest_edge": 112}, "patch_size": {"height": 14, "width": 14},
         "image_mean": _MEAN, "image_std": _STD},
        {"patch_size": 14, "spatial_merge_size": 2},
    ),
    "llava": Kind(
        {
            "text_config": {**_TEXT, "model_type": "llama"},
            "vision_config": {
                "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48,
                "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 112,
                "patch_size": 14, "hidden_act": "silu", "head_dim": 16,
            },
            "image_token_index": "[IMG]",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "tie_word_embeddings": False,
        },
        ("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]"),
        _template("[IMG]", "[INST]"),
        "LlavaProcessor", "pixtral",
        {"size": {"longest_edge": 56}, "patch_size": {"height": 14, "width": 14},
         "image_mean": _MEAN, "image_std": _STD},
        {"patch_size": 14, "vision_feature_select_strategy": "full", "image_token": "[IMG]"},
        {"image_token": "[IMG]"},
    ),
    "idefics3": Kind(
        {
            "text_config": {**_TEXT, "model_type": "llama"},
            "vision_config": {
                "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
            },
            "scale_factor": 2,
            "image_token_id": "<image>",
            "pad_token_id": 0,
        },
        ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
         *(f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4))),
        _template("<image>", ""),
        "Idefics3Processor", "idefics3",
        {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56},
         "image_mean": _MEAN, "image_std": _STD},
        {"image_seq_len": 4},
    ),
}  # fmt: skip


SHOWN = tuple(kind for kind in KINDS if kind != "mistral3")
"""Types whose processor needs no torchvision, so that they can be shown pictures everywhere."""


def build(kind: str, directory: Path, tokenizer_files: Path, *, seed: int = 1) -> Path:
    """Write a tiny model of a type, with processor and tokenizer.

    Args:
        kind: one of :data:`KINDS`.
        directory: where to; it must not exist.
        tokenizer_files: a sentencepiece tokenizer (see ``conftest.train_tokenizer``).
        seed: of the weights.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    own = KINDS[kind]
    directory.mkdir(parents=True)
    ids = _write_tokenizer(own, directory, tokenizer_files)
    settings = {k: ids.get(v, v) if isinstance(v, str) else v for k, v in own.config.items()}
    config = AutoConfig.for_model(kind, **settings)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # attention and pictures must matter
        if parameter.ndim == 2:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(str(directory))
    _write_processor(own, directory)
    return directory


def _write_tokenizer(own: Kind, directory: Path, tokenizer_files: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    for file in tokenizer_files.iterdir():
        shutil.copy(file, directory / file.name)
    tokenizer = AutoTokenizer.from_pretrained(str(directory), extra_special_tokens=dict(own.named))
    tokenizer.add_special_tokens({"additional_special_tokens": list(own.tokens)})
    tokenizer.save_pretrained(str(directory))
    return {token: tokenizer.convert_tokens_to_ids(token) for token in own.tokens}


def _write_processor(own: Kind, directory: Path) -> None:
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    names = IMAGE_PROCESSOR_MAPPING_NAMES[own.image_processor]
    name = names["torchvision"] if isinstance(names, dict) else next(filter(None, names))
    image = {"image_processor_type": name, **own.image_options}
    (directory / "preprocessor_config.json").write_text(json.dumps(image))
    processor = {"processor_class": own.processor, **own.options}
    (directory / "processor_config.json").write_text(json.dumps(processor))
    (directory / "chat_template.jinja").write_text(own.template)
