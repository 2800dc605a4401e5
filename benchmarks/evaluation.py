"""The cost of comparing two models, over the bare forward passes of both, in one run; and the
memory it takes beyond the loaded models, of which the limit is 512 MiB.

python benchmarks/evaluation.py [TOKENS]

On a CPU, at V = 49,152 the demo model, and at V = 262,144 a model of Gemma 3 270M's shape with
random weights. On a GPU, in bfloat16, random weights in the shapes of SmolLM2 135M, Gemma 3 270M
and Qwen2-VL 2B's text tower, each on texts of 256 tokens (as `qc` takes them) and of 2,048. The
candidate is the reference with its output projections disturbed by 2⁻⁸ and rounded to bfloat16.
Wall-clock time is compared, so nothing else should run meanwhile. On a CPU, whose speed may change
within seconds, both are timed text by text, one after the other.
"""

from __future__ import annotations

import copy
import os
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from process_memory import forget_peak, peak_bytes, resident_bytes
from so8tqc.sources.compare import compare, head_rows
from so8tqc.sources.hf import HFModel, HFSource
from so8tqc.sources.inputs.builtin import DEMO_MODEL, resolve_model
from so8tqc.sources.inputs.texts import encode, load_texts, load_tokenizer
from so8tqc.sources.protocol import EncodedText

LENGTH = 256
GPU_LENGTHS = (256, 2048)
CPU_TOKENS, GPU_TOKENS = 2048, 16_384

SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2 135M": {
        "model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True, "max_position_embeddings": 8192,
    },
    "Gemma 3 270M": {
        "model_type": "gemma3_text", "vocab_size": 262_144, "hidden_size": 640,
        "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256,
    },
    "Qwen2-VL 2B": {
        "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 1536,
        "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip


def main() -> None:
    cuda = torch.cuda.is_available()
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else GPU_TOKENS if cuda else CPU_TOKENS
    if cuda:
        on_a_gpu(tokens)
    else:
        on_a_cpu(max(1, tokens // LENGTH))


def on_a_cpu(texts_wanted: int) -> None:
    directory = resolve_model(DEMO_MODEL)
    texts = encode(load_texts(["builtin:validation"]), load_tokenizer(directory), LENGTH)
    report([HFModel.load(directory) for _ in range(2)], texts[:texts_wanted])
    shape = SHAPES["Gemma 3 270M"]
    random = random_texts(texts_wanted, LENGTH, shape["vocab_size"])
    report([large(shape, torch.float32, "cpu") for _ in range(2)], random)


def on_a_gpu(tokens: int) -> None:
    print(f"{torch.cuda.get_device_name()}, bfloat16, torch {torch.__version__}", flush=True)
    for name, shape in SHAPES.items():
        first = large(shape, torch.bfloat16, "cuda")
        models = [first, HFModel(copy.deepcopy(first.module), first.path)]
        for length in GPU_LENGTHS:
            print(f"{name}, texts of {length}: ", end="")
            texts = random_texts(max(2, tokens // length), length, shape["vocab_size"])
            report(models, texts)
        for model in models:
            model.close()
        del first, models
        torch.cuda.empty_cache()


def random_texts(count: int, length: int, vocabulary: int) -> list[EncodedText]:
    generator = np.random.default_rng(0)
    return [EncodedText(str(i), generator.integers(0, vocabulary, length)) for i in range(count)]


def large(shape: dict[str, Any], dtype: torch.dtype, device: str) -> HFModel:
    """A model of a shape with random weights, whose logits vary by about 3."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {key: value for key, value in shape.items() if key != "model_type"}
    config = AutoConfig.for_model(shape["model_type"], **options)
    torch.manual_seed(0)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    head = module.get_output_embeddings().weight
    head.data.normal_(std=3 * shape["hidden_size"] ** -0.5)
    return HFModel(module, Path("random"))


def report(models: Sequence[HFModel], texts: Sequence[EncodedText]) -> None:
    for name, parameter in models[1].module.named_parameters():
        if "o_proj" in name:
            disturbed = parameter.data.float() * (1 + 2**-8 * torch.rand_like(parameter.float()))
            parameter.data = disturbed.bfloat16().to(parameter.dtype)
    sources = [HFSource(model, name) for model, name in zip(models, "ab", strict=True)]
    beyond = peak_beyond(models[0].device, lambda: compare(sources, [("a", "b")], texts[:2]))
    together = len(texts) if torch.cuda.is_available() else 1
    ratios, bares = [], []
    for _ in range(3):
        bares.append(0.0)
        comparing = 0.0
        for some in batched(texts, together):
            bares[-1] += seconds(lambda some=some: bare(sources, some))
            comparing += seconds(lambda some=some: compare(sources, [("a", "b")], some))
        ratios.append(comparing / bares[-1])
    tables = compare(sources, [("a", "b")], texts)
    tokens = sum(text.tokens.size for text in texts)
    kl = tables[("a", "b")].columns["kl"].mean()
    print(f"{tokens} tokens, V = {models[0].vocab_size}, mean KL {kl:.1e}: comparing takes "
          f"{np.median(ratios):.3f} × the bare forward passes "
          f"(of {', '.join(f'{r:.3f}' for r in sorted(ratios))}; these do "
          f"{2 * tokens / np.median(bares):,.0f} tokens/s), and {beyond / 2**20:.0f} MiB beyond "
          f"the loaded models ({beyond / 2**29:.2f} of the limit)", flush=True)  # fmt: skip


def batched(texts: Sequence[EncodedText], size: int) -> Iterator[Sequence[EncodedText]]:
    for start in range(0, len(texts), size):
        yield texts[start : start + size]


def bare(sources: Sequence[HFSource], texts: Sequence[EncodedText]) -> None:
    for text in texts:
        for source in sources:
            for _ in source.logits(text.tokens, head_rows(source.vocab_size)):
                pass


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_beyond(device: torch.device, work: Callable[[], object]) -> int:
    """Bytes that some work takes on its device beyond what is there already."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        loaded = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - loaded
    loaded = resident_bytes()
    forget_peak()
    work()
    return peak_bytes() - loaded


if __name__ == "__main__":
    main()
