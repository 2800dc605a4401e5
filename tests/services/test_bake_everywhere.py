"""A bake gives the same bytes on every machine: digests that were recorded once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from so8tqc.config import BakeConfig
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.rotation_set import Target
from so8tqc.services.bake import bake

WIDTH, LAYERS = 256, 2

DIGESTS = {
    "bfloat16": {
        "exp": "11c69e5fa92e92a727cf19560c687798e73d8d9754b01f018ab1675e3c3ed6f5",
        "cayley": "dec78215c9f37078aafc7d251bd9c8208a25175ae9ff98c405242d7ab6d71c8a",
        "legacy-taylor": "6831ef2ef0728f02ef120f0e084c3756bd5f541ea496edecb6b3213e6930dd21",
    },
    "float16": {
        "exp": "5940de7b7fd664f70e6c754905e26670629d63196c4d4eaa93f9c462e3239345",
        "cayley": "29096abc45247b5029e512d183db85771f762fbea95927a37a5816248e4a3f35",
        "legacy-taylor": "0e3d3c2c251bfe2f1acab756b4ecf9fc27414ea14ac5f0c5827f35ebebc47a87",
    },
    "float32": {
        "exp": "73cfc7c7fc0fdf0fd95fecfb203bc4e33c46a3e2142336ad3fa54f8a9c8dedcb",
        "cayley": "e73f3c458dfee8bf59c06177ebf6b2f3b78b96c928d8c0157bbc29b645ddcd8d",
        "legacy-taylor": "303a28f2e1c05565e2592dd5c0cf0c2264359136d965694ee960764e37602552",
    },
}
"""SHA-256 of the baked tensors' bytes, layer by layer; made on an AMD EPYC with AVX-512, and
found again on another machine under Python 3.12, torch 2.11 and numpy 2.5."""


def numbers(count: int, seed: int) -> np.ndarray:
    """Values in (−½, ½) by integer arithmetic alone (splitmix64), the same on every machine."""
    with np.errstate(over="ignore"):
        x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x += np.uint64(seed) * np.uint64(0xD1B54A32D192ED03)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53 - 0.5


def checkpoint(directory: Path, dtype: torch.dtype) -> Path:
    directory.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": WIDTH,
        "vocab_size": WIDTH,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {
        f"model.layers.{i}.self_attn.o_proj.weight": torch.from_numpy(
            numbers(WIDTH * WIDTH, i).reshape(WIDTH, WIDTH)
        ).to(dtype)
        for i in range(LAYERS)
    }
    tensors["model.embed_tokens.weight"] = torch.zeros(WIDTH, WIDTH, dtype=dtype)
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
    return directory


def baked_digest(base: Path, gates: Path, out: Path) -> str:
    bake(BakeConfig(base=base, rotations=gates, out=out))
    digest = hashlib.sha256()
    with safe_open(str(out / "model.safetensors"), "pt") as stored:
        for i in range(LAYERS):
            tensor = stored.get_tensor(f"model.layers.{i}.self_attn.o_proj.weight")
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("parametrization", ["exp", "cayley", "legacy-taylor"])
def test_the_bytes_are_those_of_any_machine(
    dtype: str, parametrization: str, tmp_path: Path
) -> None:
    base = checkpoint(tmp_path / "base", getattr(torch, dtype))
    theta = {Target(i): numbers(WIDTH * 8, 100 + i).reshape(-1, 8, 8) * 0.7 for i in range(LAYERS)}
    gates = tmp_path / "gates.safetensors"
    kind = Parametrization(parametrization)
    write_native(
        gates, theta, parametrization=kind, convention=Convention.COLUMN, site=Site.INPUT, pet=None
    )
    got = baked_digest(base, gates, tmp_path / "baked")
    assert got == DIGESTS[dtype][parametrization]
