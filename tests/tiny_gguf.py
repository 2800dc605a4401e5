"""A Llama of random weights in GGUF, without a tokenizer: libllama runs and quantizes it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from so8tqc.gguf.rewrite import SAMPLING_TEMPERATURE

VOCABULARY, WIDTH, HIDDEN, LAYERS = 96, 32, 64, 2


def write_llama(
    path: Path, *, big_endian: bool = False, split: int = 0, dtype: type = np.float32, seed: int = 0
) -> Path:
    """A Llama of random weights without a tokenizer, which libllama can run."""
    order = gguf.GGUFEndian.BIG if big_endian else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(str(path), "llama", endianess=order)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    writer.add_float32(SAMPLING_TEMPERATURE, 0.7)
    writer.add_array("test.words", ["a", "", "長い"])
    writer.add_array("test.numbers", [1, 2, 3])
    writer.add_bool("test.flag", True)
    if split:
        writer.add_uint16("split.count", split)
    generator = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> None:
        values = generator.normal(size=shape) * shape[-1] ** -0.5
        array = values.astype(dtype) if len(shape) > 1 else np.ones(shape, np.float32)
        writer.add_tensor(name, array)

    weight("token_embd.weight", VOCABULARY, WIDTH)
    for i in range(LAYERS):
        weight(f"blk.{i}.attn_norm.weight", WIDTH)
        weight(f"blk.{i}.attn_q.weight", WIDTH, WIDTH)
        weight(f"blk.{i}.attn_k.weight", WIDTH // 2, WIDTH)
        weight(f"blk.{i}.attn_v.weight", WIDTH // 2, WIDTH)
        weight(f"blk.{i}.attn_output.weight", WIDTH, WIDTH)
        weight(f"blk.{i}.ffn_norm.weight", WIDTH)
        weight(f"blk.{i}.ffn_gate.weight", HIDDEN, WIDTH)
        weight(f"blk.{i}.ffn_up.weight", HIDDEN, WIDTH)
        weight(f"blk.{i}.ffn_down.weight", WIDTH, HIDDEN)
    weight("output_norm.weight", WIDTH)
    weight("output.weight", VOCABULARY, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wide(
    path: Path, width: int = 256, layers: int = 1, *, vocabulary: int = 64, keys: bool = False
) -> Path:
    """A Llama for K-quants; all matrices but ``ffn_down`` have ``width`` columns.

    ``keys``: the header has those that libllama sets when it quantizes.
    """
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(256)
    writer.add_block_count(layers)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("none")
    if keys:
        writer.add_quantization_version(2)
        writer.add_file_type(1)
    make = np.random.default_rng(0).normal
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocabulary, width)}
    for i in range(layers):
        shapes |= {
            f"blk.{i}.{n}": (width, width) for n in ("attn_q", "attn_k", "attn_v", "attn_output")
        }
        shapes |= {f"blk.{i}.{n}": (width,) for n in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{i}.{n}": (256, width) for n in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{i}.ffn_down"] = (width, 256)
    shapes |= {"output_norm": (width,), "output": (vocabulary, width)}
    for name, shape in shapes.items():
        kind = np.float16 if len(shape) > 1 else np.float32
        writer.add_tensor(f"{name}.weight", (make(size=shape) / 16).astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
