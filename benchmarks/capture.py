"""The cost of recording a capture over the bare forward pass, and what its 16-bit types lose.

python benchmarks/capture.py [TOKENS]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np

from so8tqc.metrics.divergence import summarise
from so8tqc.sources.capture import CaptureSource, open_capture
from so8tqc.sources.capture_writer import write_capture
from so8tqc.sources.compare import compare, head_rows
from so8tqc.sources.hf import HFModel, HFSource
from so8tqc.sources.inputs.builtin import DEMO_MODEL, resolve_model
from so8tqc.sources.inputs.texts import encode, load_texts, load_tokenizer


def main() -> None:
    directory = resolve_model(DEMO_MODEL)
    limit = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    texts = encode(load_texts(["builtin:validation"]), load_tokenizer(directory), 256)
    texts = texts[: max(1, limit // 256)]
    source = HFSource(HFModel.load(directory), "live")
    tokens = sum(text.tokens.size for text in texts)
    print(f"{tokens} tokens, V = {source.vocab_size}")
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("F32", "F16", "BF16"):
            path = Path(folder) / f"{dtype}.safetensors"
            ratios = []
            for _ in range(3):
                started = time.perf_counter()
                for text in texts:
                    for _block in source.logits(text.tokens, head_rows(source.vocab_size)):
                        pass
                bare = time.perf_counter() - started
                started = time.perf_counter()
                error = write_capture(path, source, texts, dtype, {})
                ratios.append((time.perf_counter() - started) / bare)
            started = time.perf_counter()
            capture = CaptureSource(open_capture(path), "capture")
            for text in texts:
                for _block in capture.logits(text.tokens, head_rows(capture.vocab_size)):
                    pass
            reading = (time.perf_counter() - started) / bare
            result = summarise(compare([source, capture], [("capture", "live")], texts)[
                ("capture", "live")])  # fmt: skip
            print(
                f"{dtype}: {path.stat().st_size / tokens / 1000:.1f} kB a token; recording takes "
                f"{np.median(ratios):.3f} × the bare forward pass, reading {reading:.3f} ×; "
                f"largest |Δlogit| {error:.3g}, KL mean {result['kl_mean']:.2e}, "
                f"max {result['kl_max']:.2e}, same top token {result['top1']:.2%}"
            )


if __name__ == "__main__":
    main()
