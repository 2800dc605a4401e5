"""GGUF files without a converter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Callable[[int], Path]:
    """Writes a random llama of one layer, width 32 and V = 64, given its context length."""

    def write(context: int) -> Path:
        import gguf

        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_context_length(context)
        writer.add_embedding_length(32)
        writer.add_feed_forward_length(32)
        writer.add_block_count(1)
        writer.add_head_count(2)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(64)
        writer.add_tokenizer_model("none")
        make = np.random.default_rng(0).normal
        for name in ("token_embd", "output"):
            writer.add_tensor(f"{name}.weight", make(size=(64, 32)).astype(np.float32))
        for name in (
            "attn_q",
            "attn_k",
            "attn_v",
            "attn_output",
            "ffn_gate",
            "ffn_up",
            "ffn_down",
        ):
            writer.add_tensor(f"blk.0.{name}.weight", (make(size=(32, 32)) / 6).astype(np.float32))
        for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
            writer.add_tensor(f"{name}.weight", np.ones(32, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
