"""A small Llama for encoders: rows of 96, and of 256 for K-quants; the text it is calibrated on."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

DOCS = Path(__file__).parents[1] / "docs"


def write_wide(folder: Path, tokenizer_files: Path, *, layers: int = 3, seed: int = 5) -> Path:
    """A model directory; the third layer's feed-forward hardly matters, so that types should
    differ."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    made = LlamaForCausalLM(config)
    for name, parameter in made.named_parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
        if ".2." in name and "down" in name:
            parameter.data *= 0.1
    made.half().save_pretrained(str(folder))
    for file in tokenizer_files.iterdir():
        shutil.copy(file, folder / file.name)
    return folder


def write_calibration(path: Path) -> Path:
    """Some thousand tokens of this project's own pages."""
    path.write_text((DOCS / "concepts.md").read_text(encoding="utf-8") * 3, encoding="utf-8")
    return path
