"""The cost of comparing two models, over the bare forward passes of both, in one run; and the
memory it takes beyond the loaded models, of which the limit is 512 MiB.

python benchmarks/evaluation.py [TOKENS]

At V = 49,152 the demo model, and at V = 262,144 a model of Gemma 3 270M's shape with random
weights; the candidate is the reference with its weights rounded to bfloat16 once more.
Wall-clock time is compared, so nothing else should run meanwhile.
"""

from __future__ import annotations

import os
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from process_memory import forget_peak, peak_bytes, resident_bytes
from so8tqc.services.builtin import DEMO_MODEL, resolve_model
from so8tqc.sources.compare import compare, head_rows
from so8tqc.sources.hf import HFModel, HFSource
from so8tqc.sources.protocol import EncodedText
from so8tqc.sources.texts import encode, load_texts, load_tokenizer

LENGTH = 256


def main() -> None:
    texts_wanted = max(1, (int(sys.argv[1]) if len(sys.argv) > 1 else 2048) // LENGTH)
    directory = resolve_model(DEMO_MODEL)
    texts = encode(load_texts(["builtin:validation"]), load_tokenizer(directory), LENGTH)
    report([HFModel.load(directory) for _ in range(2)], texts[:texts_wanted])
    generator = np.random.default_rng(0)
    random = [
        EncodedText(str(i), generator.integers(0, 262_144, LENGTH)) for i in range(texts_wanted)
    ]
    report([large() for _ in range(2)], random)


def large() -> HFModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gemma3_text", vocab_size=262_144, hidden_size=640, intermediate_size=2048,
        num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1, head_dim=256,
    )  # fmt: skip
    torch.manual_seed(0)
    return HFModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32), Path("random"))


def report(models: Sequence[HFModel], texts: Sequence[EncodedText]) -> None:
    for name, parameter in models[1].module.named_parameters():
        if "o_proj" in name:
            parameter.data *= 1 + 2**-8 * torch.rand_like(parameter)
            parameter.data = parameter.data.bfloat16().float()
    sources = [HFSource(model, name) for model, name in zip(models, "ab", strict=True)]
    loaded = resident_bytes()
    forget_peak()
    compare(sources, [("a", "b")], texts[:1])
    beyond = (peak_bytes() - loaded) / 2**20
    ratios = []
    for _ in range(3):
        started = time.perf_counter()
        for text in texts:
            for source in sources:
                for _ in source.logits(text.tokens, head_rows(source.vocab_size)):
                    pass
        bare = time.perf_counter() - started
        started = time.perf_counter()
        tables = compare(sources, [("a", "b")], texts)
        ratios.append((time.perf_counter() - started) / bare)
    tokens = sum(text.tokens.size for text in texts)
    kl = tables[("a", "b")].columns["kl"].mean()
    print(f"{tokens} tokens, V = {models[0].vocab_size}, mean KL {kl:.1e}: comparing takes "
          f"{np.median(ratios):.3f} × the bare forward passes "
          f"(of {', '.join(f'{r:.3f}' for r in sorted(ratios))}), and {beyond:.0f} MiB beyond the "
          f"loaded models ({beyond / 512:.2f} of the limit)", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
