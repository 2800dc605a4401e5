"""SmolLM2-135M moved off the grid that its package stores it on, as a model directory.

python examples/off_grid_model.py DIRECTORY

The package holds the model in Q4_1, so that its weights lie on a grid of sixteen steps a block, and
an encoder that finds this grid again seems to lose nothing. Noise, uniform over one step of each
weight's own block, makes a model of the same quality class that no format can say exactly. The seed
is fixed; the directory is stored in float16.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from so8tqc.gguf.file import GGUFTensor, open_gguf
from so8tqc.gguf.tensor_map import gguf_names, interleave_rope
from so8tqc.quantizers.grids import GRIDS
from so8tqc.quantizers.packing import unpack
from so8tqc.sources.inputs.builtin import DEMO_MODEL, demo_gguf, resolve_model

SEED = 0


def steps(tensor: GGUFTensor) -> npt.NDArray[np.float32]:
    """The step of each weight's block, in the tensor's shape."""
    grid = GRIDS[tensor.type]
    blocks = unpack(tensor.raw.reshape(-1, grid.bytes), grid)
    scale = np.abs(blocks.d.astype(np.float32)[:, None] * blocks.scales)
    return np.repeat(scale, grid.group, axis=1).reshape(tensor.shape)


def in_rows_of_transformers(values: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """q or k as a GGUF stores them, back in transformers' order of rows."""
    order = interleave_rope(np.arange(len(values), dtype=np.float32)[:, None], heads)
    found = np.empty_like(values)
    found[order[:, 0].astype(int)] = values
    return found


def off_grid(directory: Path) -> Path:
    """Write the model directory; returns it."""
    source = resolve_model(DEMO_MODEL)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tensors = open_gguf(demo_gguf()).tensors
    config = model.config
    names = gguf_names([n for n, _ in model.named_parameters()], "llama", config.num_hidden_layers)
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    draw = np.random.default_rng(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = tensors[str(names[name])]
            if tensor.type not in GRIDS:
                continue
            step = steps(tensor)
            for part, count in heads.items():
                if part in tensor.name:
                    step = in_rows_of_transformers(step, count)
            noise = draw.uniform(-0.5, 0.5, size=step.shape) * step
            parameter.add_(torch.from_numpy(noise.astype(np.float32)))
    model.half().save_pretrained(directory)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    return directory


if __name__ == "__main__":
    print(off_grid(Path(sys.argv[1])))
