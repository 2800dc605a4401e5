"""What the process must survive: large blocks, and Ctrl-C while a model loads."""

from __future__ import annotations

import signal

import numpy as np
import pytest

from so8tqc.llama import libllama
from so8tqc.llama.child import reason


def test_an_interruption_is_held_back_not_lost() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), libllama._interrupts_deferred():
        signal.raise_signal(signal.SIGINT)
        reached.append(True)
    assert reached == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_cause_is_preferred_to_the_conclusion() -> None:
    lines = ["load: 0 tokens", "error loading model: no vocabulary", "failed to load model"]
    assert reason(lines) == "error loading model: no vocabulary"
    assert reason(["a", "failed to quantize: disk", "done"]) == "failed to quantize: disk"
    assert reason([]) == "no output"


@pytest.mark.llama
def test_a_block_may_be_as_long_as_the_text(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """libllama aborts the whole process when a batch exceeds its n_batch."""
    import gguf

    from so8tqc.sources.gguf import GGUFSource

    path = tmp_path / "long.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(1024)
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
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", (make(size=(32, 32)) / 6).astype(np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    tokens = np.random.default_rng(0).integers(0, 64, size=800)
    source = GGUFSource(path, "long", threads=1)
    (whole,) = (block.numpy().copy() for block in source.logits(tokens, 800))
    parts = np.concatenate([block.numpy().copy() for block in source.logits(tokens, 100)])
    source.close()
    assert whole.shape == (800, 64)
    np.testing.assert_allclose(whole, parts, atol=0.05)
