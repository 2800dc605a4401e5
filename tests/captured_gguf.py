"""A small Llama as GGUF without a tokenizer, and its own logits as a capture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from so8tqc.llama.libllama import LlamaModel

VOCABULARY = 64
TEXTS, LENGTH = 8, 24

Make = Callable[[str, tuple[int, ...]], np.ndarray]


def gaussian(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights of which ``ffn_down`` matters far more than the others."""
    generator = np.random.default_rng(sum(name.encode()))
    scale = {"ffn_down": 4.0, "attn_q": 0.3, "attn_k": 0.3}.get(name.rpartition(".")[2], 1.0)
    return generator.normal(size=shape) * scale / np.sqrt(shape[-1])


def four_bit(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The same weights after Q4_1: 16 evenly spaced values in every block of 32."""
    blocks = gaussian(name, shape).reshape(-1, 32)
    low = blocks.min(axis=1, keepdims=True)
    step = (blocks.max(axis=1, keepdims=True) - low) / 15
    return (np.round((blocks - low) / step) * step + low).reshape(shape)


def write_model(path: Path, make: Make = gaussian, width: int = 256, layers: int = 2) -> Path:
    """A Llama in F16; V = 64, context 64."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(256)
    writer.add_block_count(layers)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCABULARY, width)}
    for i in range(layers):
        shapes |= {
            f"blk.{i}.{n}": (width, width) for n in ("attn_q", "attn_k", "attn_v", "attn_output")
        }
        shapes |= {f"blk.{i}.{n}": (width,) for n in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{i}.{n}": (256, width) for n in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{i}.ffn_down"] = (width, 256)
    shapes |= {"output_norm": (width,), "output": (VOCABULARY, width)}
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(shape, dtype=np.float32))
        else:
            writer.add_tensor(f"{name}.weight", make(name, shape).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def token_texts() -> list[np.ndarray]:
    """[TEXTS] of [LENGTH] ids."""
    generator = np.random.default_rng(5)
    return [generator.integers(0, VOCABULARY, size=LENGTH) for _ in range(TEXTS)]


def logits_of(path: Path) -> list[np.ndarray]:
    """[TEXTS] of [LENGTH, V] float64, by libllama."""
    model = LlamaModel(path, threads=1)
    found = []
    for tokens in token_texts():
        model.begin(tokens.size)
        found.append(model.decode(tokens, 0).astype(np.float64))
    model.close()
    return found


def write_capture(path: Path, model: Path) -> Path:
    """The model's logits as a reference."""
    tensors: dict[str, torch.Tensor] = {}
    for i, (tokens, logits) in enumerate(zip(token_texts(), logits_of(model), strict=True)):
        tensors[f"tokens.{i}"] = torch.from_numpy(tokens)
        tensors[f"logits.{i}"] = torch.from_numpy(logits.astype(np.float32))
    save_file(tensors, str(path), {"so8t.capture_version": "1"})
    return path
