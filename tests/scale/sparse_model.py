"""Checkpoints of any size whose files take no room: valid headers, and data that are holes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from so8tqc.checkpoints.safetensors_index import encode_header
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.rotation_set import Target

LLAMA_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def write_sparse(directory: Path, config: dict[str, object], shards: int) -> int:
    """A Llama checkpoint in BF16, every weight 0, over so many files; bytes of its weights."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    shapes = list(shapes_of(config).items())
    parts = [shapes[i::shards] for i in range(shards)]
    weight_map, total = {}, 0
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        header, offset = {}, 0
        for name, shape in part:
            size = 2 * int(np.prod(shape, dtype=np.int64))
            header[name] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": [offset, offset + size],
            }
            weight_map[name] = file
            offset += size
        encoded = encode_header(header)
        with (directory / file).open("wb") as stream:
            stream.write(encoded)
            stream.truncate(len(encoded) + offset)
        total += offset
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def shapes_of(config: dict[str, object]) -> dict[str, list[int]]:
    width, inner, vocabulary, layers, heads, groups = (
        int(str(config[name]))
        for name in (
            "hidden_size",
            "intermediate_size",
            "vocab_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
        )
    )
    narrow = width // heads * groups
    shapes = {"model.embed_tokens.weight": [vocabulary, width]}
    for i in range(layers):
        below = f"model.layers.{i}"
        shapes |= {
            f"{below}.self_attn.q_proj.weight": [width, width],
            f"{below}.self_attn.k_proj.weight": [narrow, width],
            f"{below}.self_attn.v_proj.weight": [narrow, width],
            f"{below}.self_attn.o_proj.weight": [width, width],
            f"{below}.mlp.gate_proj.weight": [inner, width],
            f"{below}.mlp.up_proj.weight": [inner, width],
            f"{below}.mlp.down_proj.weight": [width, inner],
            f"{below}.input_layernorm.weight": [width],
            f"{below}.post_attention_layernorm.weight": [width],
        }
    return shapes | {"model.norm.weight": [width], "lm_head.weight": [vocabulary, width]}


def write_gates(path: Path, config: dict[str, object]) -> None:
    """Gates for every layer."""
    blocks = int(str(config["hidden_size"])) // 8
    generator = np.random.default_rng(0)
    layers = range(int(str(config["num_hidden_layers"])))
    theta = {
        Target(i): (generator.normal(size=(blocks, 8, 8)) * 0.1).astype(np.float32) for i in layers
    }
    write_native(
        path,
        theta,
        parametrization=Parametrization.EXP,
        convention=Convention.COLUMN,
        site=Site.INPUT,
        pet=None,
    )
