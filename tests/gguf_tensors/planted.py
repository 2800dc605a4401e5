"""GGUF files in memory: honest ones, and ones with a fault planted in one tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.gguf.file import GGUFFile, GGUFTensor
from so8tqc.gguf.tensor_map import stored_as
from so8tqc.llama.ggml import dequantizer, encode
from so8tqc.services.tensors.expected import Expected, expected_of

WIDTHS = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
"""Of the tiny models: every width is whole blocks of all types."""

Change = Callable[[np.ndarray], np.ndarray]


def save_model(folder: Path, architecture: str, tokenizer: Path) -> Path:
    """A tiny model of an architecture whose weights have outliers, as trained ones do."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    for file in tokenizer.iterdir():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / file.name)
    known = AutoConfig.for_model(architecture)  # a dense model with a number of experts is none
    widths = {key: value for key, value in WIDTHS.items() if hasattr(known, key)}
    config = AutoConfig.for_model(architecture, vocab_size=512, **widths)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            spread = torch.distributions.StudentT(5.0).sample(parameter.shape)
            parameter.data.copy_(spread * 0.8 * parameter.shape[-1] ** -0.5)
        else:
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
    model.to(torch.bfloat16).save_pretrained(str(folder))
    return folder


@dataclass(frozen=True)
class Bench:
    """A model, what its GGUF must hold, and the float32 weights of every tensor in it."""

    expected: Expected
    shapes: Mapping[str, tuple[int, ...]]
    weights: Mapping[str, np.ndarray]


def bench_of(model: Path) -> Bench:
    """Trace the conversion of a model directory."""
    checkpoint = open_checkpoint(model)
    empty = GGUFFile(Path("none"), {"general.architecture": "llama"}, {})
    expected = expected_of(checkpoint, empty)
    assert expected.conversion is not None, expected.untraced
    weights = {name: expected.values(name) for name in expected.names}
    return Bench(expected, {n: w.shape for n, w in weights.items()}, weights)


def importance_of(columns: int) -> np.ndarray:
    """An importance matrix over four decades."""
    spread = np.random.default_rng(columns).normal(0, 1.5, columns)
    return np.exp(spread).astype(np.float32)


def type_of(name: str, shape: tuple[int, ...], type_: str) -> str:
    """What an encoder makes of a tensor: vectors and small routers stay F32."""
    if len(shape) == 1 or "ffn_gate_inp" in name or "norm" in name:
        return "F32"
    return type_


def stored(values: np.ndarray, type_: str, importance: np.ndarray | None = None) -> np.ndarray:
    """[…] float32 → the bytes of a tensor of this type, rows × bytes."""
    matrix = np.ascontiguousarray(values.reshape(-1, values.shape[-1]), dtype=np.float32)
    if type_ in ("F32", "F16", "BF16"):
        with np.errstate(over="ignore"):
            made = np.ascontiguousarray(stored_as(matrix, type_))
        return made.view(np.uint8).reshape(len(matrix), -1)
    return encode(matrix, type_, importance)


def decoded(data: np.ndarray, type_: str, columns: int) -> np.ndarray:
    out = np.empty((len(data), columns), np.float32)
    dequantizer(type_)(np.ascontiguousarray(data).reshape(-1), out.reshape(-1))
    return out


def file_of(
    bench: Bench,
    type_: str,
    *,
    importance: bool = False,
    changes: Mapping[str, Change] | None = None,
    through: str | None = None,
    bytes_changed: Mapping[str, Change] | None = None,
) -> GGUFFile:
    """A file of all tensors in one type.

    Args:
        bench: the model.
        type_: of its matrices.
        importance: whether they are encoded with an importance matrix.
        changes: tensor → what is done to its weights before they are encoded.
        through: another type that they are encoded in before.
        bytes_changed: tensor → what is done to its bytes [rows, bytes] afterwards.
    """
    tensors = {}
    for name, weights in bench.weights.items():
        kind = type_of(name, weights.shape, type_)
        values = weights
        if changes and name in changes:
            values = changes[name](values.copy())
        if through and kind != "F32":
            coarse = stored(values, through)
            values = decoded(coarse, through, values.shape[-1]).reshape(values.shape)
        columns = values.shape[-1]
        data = stored(values, kind, importance_of(columns) if importance else None)
        if bytes_changed and name in bytes_changed:
            data = bytes_changed[name](data.copy())
        tensors[name] = GGUFTensor(name, kind, weights.shape, data.nbytes, 0, data)
    return GGUFFile(Path("made.gguf"), {"general.architecture": "llama"}, tensors)
