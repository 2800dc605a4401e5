"""A whole audit of a Q4_K_M file over reading and dequantizing that file once, in one run.

python benchmarks/audit.py [LAYERS [REPEATS]]

The model is synthetic: Llama shapes (2048 wide, 8192 in the MLP), bfloat16 weights from a seed,
61 M weights a layer and the demo model's tokenizer; 26 layers (the default) make about 1 GB. The
audit reads base and file, and writes record and page; the measure beside it reads the file and
dequantizes every tensor by libggml, with as many threads.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from safetensors.torch import save_file

import so8tqc
from so8tqc.config import ExportConfig, QuantizeConfig
from so8tqc.gguf.file import GGUFTensor, open_gguf
from so8tqc.llama.ggml import dequantizer
from so8tqc.services.export.service import write_gguf
from so8tqc.services.quantize.service import quantize
from so8tqc.sources.inputs.builtin import DEMO_MODEL, resolve_model
from so8tqc.threads import WORKERS

WIDTH, MLP, HEADS, KV_HEADS = 2048, 8192, 32, 8


def save_model(folder: Path, layers: int) -> None:
    """A model directory of these shapes; its head is its embedding."""
    demo = resolve_model(DEMO_MODEL)
    shutil.copytree(demo, folder, ignore=shutil.ignore_patterns("*.safetensors*", "so8tqc.json"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        "hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": WIDTH // HEADS,
        "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    narrow = WIDTH // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (narrow, WIDTH),
        "self_attn.v_proj": (narrow, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (MLP, WIDTH), "mlp.up_proj": (MLP, WIDTH), "mlp.down_proj": (WIDTH, MLP),
        "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return (torch.randn(shape, generator=generator) * shape[1] ** -0.5).to(torch.bfloat16)

    tensors = {
        "model.embed_tokens.weight": drawn((config["vocab_size"], WIDTH)),
        "model.norm.weight": drawn((WIDTH,)),
    }
    for layer in range(layers):
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = drawn(shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def dequantize_all(file: Path) -> None:
    """Read a file and dequantize every tensor once."""

    def work(tensor: GGUFTensor) -> None:
        dequantizer(tensor.type)(tensor.read(), np.empty(tensor.elements, np.float32))

    with ThreadPoolExecutor(max_workers=WORKERS) as pool:
        list(pool.map(work, open_gguf(file).tensors.values()))


def main() -> None:
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 26
    repeats = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    with tempfile.TemporaryDirectory() as scratch:
        model, f16 = Path(scratch) / "model", Path(scratch) / "model-F16.gguf"
        save_model(model, layers)
        write_gguf(ExportConfig(model=model, out=f16))
        made = quantize(QuantizeConfig(gguf=f16, types=("Q4_K_M",), out=Path(scratch) / "q"))
        (file,) = (Path(o.path) for o in made.outputs.values() if o.path.endswith(".gguf"))
        f16.unlink()
        whole, once = [], []
        for index in range(repeats):
            once.append(seconds(lambda: dequantize_all(file)))
            out = Path(scratch) / f"audit-{index}"
            whole.append(seconds(lambda out=out: so8tqc.audit(file, model, out)))  # type: ignore[misc]
        size = open_gguf(file).size / 1e9
        audit, alone = statistics.median(whole), statistics.median(once)
        print(
            f"{size:.2f} GB of Q4_K_M: audit {audit:.1f} s ({min(whole):.1f} to "
            f"{max(whole):.1f}), {size / audit * 60:.2f} GB a minute; read and dequantized once "
            f"{alone:.1f} s; {audit / alone:.1f} ×",
            flush=True,
        )


if __name__ == "__main__":
    main()
