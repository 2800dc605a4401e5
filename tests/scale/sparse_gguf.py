"""A Llama in GGUF of any size whose data are holes: valid header, every weight 0."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_sparse_gguf(
    path: Path, config: dict[str, object], shapes: dict[str, list[int]], type_: str
) -> int:
    """The GGUF of a checkpoint of these shapes, matrices in a type; bytes of its tensors."""
    kind = gguf.GGMLQuantizationType[type_]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(int(str(config["max_position_embeddings"])))
    writer.add_embedding_length(int(str(config["hidden_size"])))
    writer.add_feed_forward_length(int(str(config["intermediate_size"])))
    writer.add_block_count(int(str(config["num_hidden_layers"])))
    writer.add_head_count(int(str(config["num_attention_heads"])))
    writer.add_head_count_kv(int(str(config["num_key_value_heads"])))
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(int(str(config["vocab_size"])))
    total = 0
    for source, shape in shapes.items():
        own = kind if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        block, size = gguf.GGML_QUANT_SIZES[own]
        stored = int(np.prod(shape, dtype=np.int64)) // block * size
        if own is gguf.GGMLQuantizationType.F32:
            writer.add_tensor_info(_name(source), shape, np.dtype(np.float32), stored)
        else:
            rows = [*shape[:-1], shape[-1] // block * size]
            writer.add_tensor_info(_name(source), rows, np.dtype(np.uint8), stored, raw_dtype=own)
        total += writer.ggml_pad(stored, writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = path.stat().st_size
    with path.open("r+b") as stream:
        stream.truncate(writer.ggml_pad(header, writer.data_alignment) + total)
    return total


def _name(source: str) -> str:
    stem, _, leaf = source.rpartition(".")
    around = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    if stem in around:
        return f"{around[stem]}.{leaf}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[inner]}.{leaf}"
