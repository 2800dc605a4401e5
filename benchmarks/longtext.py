"""Attention entropy of every layer and head at 8,192 tokens: time and memory, beside the peers.

python benchmarks/longtext.py [TOKENS]

SmolLM2-135M, float32, each row in a process of its own:

* plain: transformers' own forward pass (sdpa), backbone only;
* entropy: the same with so8tqc's streamed attention entropy;
* probe: what ``so8tqc longtext`` runs, with the energies of the hidden states, too;
* output_attentions: transformers' way to the same numbers (eager), with ONE of the 30 layers.

Promised: entropy takes at most 2 × the time of plain, and 2.5 GiB at its peak.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from process_memory import peak_bytes
from so8tqc.sources.attention import attention_entropy
from so8tqc.sources.hf import HFModel
from so8tqc.sources.inputs.builtin import DEMO_MODEL, resolve_model
from so8tqc.sources.inputs.texts import encode, load_texts, load_tokenizer
from so8tqc.sources.probe import probe

ROWS = ("plain", "entropy", "probe", "output_attentions")
GIB = 1024**3
TIME_LIMIT, MEMORY_LIMIT = 2.0, 2.5


def main() -> None:
    length = int(sys.argv[1]) if len(sys.argv) > 1 else 8192
    print(f"{length} tokens, {torch.get_num_threads()} threads")
    found = {}
    for row in ROWS:
        command = [sys.executable, __file__, row, str(length)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[row] = json.loads(output.strip().splitlines()[-1])
        seconds, peak, idle = (found[row][key] for key in ("seconds", "peak", "idle"))
        print(f"{row:>18}: {seconds:6.1f} s  peak {peak / GIB:5.2f} GiB "
              f"({(peak - idle) / GIB:.2f} above the loaded model)", flush=True)  # fmt: skip
    ratio = found["entropy"]["seconds"] / found["plain"]["seconds"]
    peak = found["entropy"]["peak"] / GIB
    print(
        f"entropy: {ratio:.2f} × plain (limit {TIME_LIMIT}), {peak:.2f} GiB (limit {MEMORY_LIMIT})"
    )
    layer = 9 * length**2 * 4 / GIB
    print(f"weights that output_attentions keeps: {layer:.2f} GiB a layer, {30 * layer:.0f} in all")
    sys.exit(not (ratio <= TIME_LIMIT and peak <= MEMORY_LIMIT))


def child(row: str, length: int) -> None:
    directory = resolve_model(DEMO_MODEL)
    tokens = tokens_of(length)
    attention = "eager" if row == "output_attentions" else None
    model = HFModel.load(directory, attention=attention)
    if row == "output_attentions":
        del model.module.model.layers[1:]
        model.config.num_hidden_layers = 1
    idle = peak_bytes()
    started = time.perf_counter()
    if row == "plain":
        model.hidden(tokens)
    elif row == "entropy":
        with attention_entropy(model) as collector:
            model.hidden(tokens)
        assert collector.array().shape == (30, 9, length)
    elif row == "probe":
        assert probe(model, tokens).entropy is not None
    else:
        ids = torch.from_numpy(tokens)[None]
        with torch.inference_mode():
            (weights,) = model.module.model(
                input_ids=ids, output_attentions=True, use_cache=False
            ).attentions
        torch.stack([torch.special.entr(head).sum(-1) for head in weights[0]])
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak": peak_bytes(), "idle": idle}))


def tokens_of(length: int) -> np.ndarray:
    """The built-in long texts, one after another, as often as needed."""
    tokenizer = load_tokenizer(resolve_model(DEMO_MODEL))
    texts = encode(load_texts(["builtin:longtext"]), tokenizer, length)
    return np.resize(np.concatenate([text.tokens for text in texts]), length)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        child(sys.argv[1], int(sys.argv[2]))
    else:
        main()
