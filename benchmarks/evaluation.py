"""The cost of comparing two models, over the bare forward passes of both, in one run.

python benchmarks/evaluation.py [TOKENS]
"""

from __future__ import annotations

import os
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np

from so8tqc.services.builtin import DEMO_MODEL, resolve_model
from so8tqc.sources.compare import HEAD_ROWS, compare
from so8tqc.sources.hf import HFModel, HFSource
from so8tqc.sources.texts import encode, load_texts, load_tokenizer


def main() -> None:
    directory = resolve_model(DEMO_MODEL)
    limit = int(sys.argv[1]) if len(sys.argv) > 1 else 2048
    texts = encode(load_texts(["builtin:validation"]), load_tokenizer(directory), 256)
    texts = texts[: max(1, limit // 256)]
    model = HFModel.load(directory)
    sources = [HFSource(model, "a"), HFSource(model, "b")]
    ratios = []
    for _ in range(3):
        started = time.perf_counter()
        for source in sources:
            for text in texts:
                for _ in source.logits(text.tokens, HEAD_ROWS):
                    pass
        bare = time.perf_counter() - started
        started = time.perf_counter()
        compare(sources, [("a", "b")], texts)
        ratios.append((time.perf_counter() - started) / bare)
    tokens = sum(text.tokens.size for text in texts)
    print(f"{tokens} tokens, V = {model.vocab_size}: comparing takes {np.median(ratios):.3f} × the "
          f"bare forward passes (of {', '.join(f'{r:.3f}' for r in sorted(ratios))})")  # fmt: skip


if __name__ == "__main__":
    main()
