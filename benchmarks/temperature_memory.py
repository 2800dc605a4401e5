"""Peak memory of a calibration of a GGUF file with V = 262,144, both processes counted.

    python benchmarks/temperature_memory.py [--tokens 5120]

A Llama of random weights, one layer and the vocabulary of Gemma 3 is written, run by libllama and
calibrated over ten strata as `so8tqc calibrate` does it, all objectives, groups and intervals
included. Counted are the growth of this process over what it holds with everything imported, and
the whole of libllama's; the memory that both map counts twice. The limit is the file's size +
512 MiB. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import psutil

from process_memory import peak_bytes
from so8tqc.config import CalibrateOptions
from so8tqc.services.calibrate.holdout import split_texts
from so8tqc.services.calibrate.verdict import calibrate_source
from so8tqc.sources.gguf import GGUFSource
from so8tqc.sources.protocol import EncodedText

VOCABULARY, WIDTH, CONTEXT = 262_144, 64, 512
LIMIT = 512 << 20
DOMAINS = 10


def write_model(path: Path, vocabulary: int = VOCABULARY) -> None:
    """A Llama of one layer without a tokenizer, its logits spread by 3."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("none")
    generator = np.random.default_rng(0)

    def weight(name: str, rows: int, spread: float) -> None:
        values = generator.standard_normal((rows, WIDTH), dtype=np.float32)
        writer.add_tensor(f"{name}.weight", (spread * WIDTH**-0.5 * values).astype(np.float16))

    weight("token_embd", vocabulary, 1.0)
    weight("output", vocabulary, 3.0)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        weight(f"blk.0.{name}", WIDTH, 1.0)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def texts_of(tokens: int, vocabulary: int) -> list[EncodedText]:
    """Random texts of 257 tokens, half of each language, over ten domains."""
    generator = np.random.default_rng(1)
    return [
        EncodedText(
            f"t{i}", generator.integers(0, vocabulary, 257), ("en", "ja")[i % 2], str(i % DOMAINS)
        )
        for i in range(tokens // 256)
    ]


def calibrate(path: Path, texts: list[EncodedText]) -> float:
    """Calibrate the file; bytes that its libllama process held at most."""
    source = GGUFSource(path, path.name, context=CONTEXT)
    workers = psutil.Process().children()
    calibrate_source(source, texts, split_texts(texts, 0.5, 0), CalibrateOptions())
    held = sum(peak_bytes(worker.pid) for worker in workers)
    source.close()
    return held


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=5120)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        small, path = Path(directory) / "small.gguf", Path(directory) / "large.gguf"
        write_model(small, 512)
        calibrate(small, texts_of(10 * 256, 512))  # everything is imported
        write_model(path)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
        before = psutil.Process().memory_info().rss
        texts = texts_of(options.tokens, VOCABULARY)
        model = path.stat().st_size
        worker = calibrate(path, texts)
        added = peak_bytes() - before
    over = added + worker - model
    print(f"V = {VOCABULARY:,}, {256 * len(texts):,} tokens, a file of {model / 2**20:.0f} MiB")
    print(f"  this process grows by {added / 2**20:.0f} MiB, libllama's holds "
          f"{worker / 2**20:.0f} MiB")  # fmt: skip
    print(f"  over the model: {over / 2**20:.0f} MiB, limit {LIMIT >> 20} MiB")
    print("target met" if over <= LIMIT else "the target was missed")
    return 0 if over <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
