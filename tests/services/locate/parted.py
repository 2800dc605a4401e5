"""Models that part from their reference: directories and GGUF files with one fault planted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from so8tqc.config import LocateConfig
from so8tqc.gguf.file import GGUFTensor, open_gguf
from so8tqc.gguf.tensor_map import stored_as
from so8tqc.llama.ggml import encode
from so8tqc.record_kinds.locate import LocateMetrics, OperationRow
from so8tqc.records import Record
from so8tqc.services.locate.service import locate

COMMON = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Widths are whole blocks of all types."""

OWN = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": False},
    "gemma3_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 16,
        "query_pre_attn_scalar": 64,
        "final_logit_softcapping": 30.0,
    },
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    "phi3": {},
}

Weights = dict[str, "object"]
Change = Callable[[dict], None]


def save_model(folder: Path, architecture: str, tokenizer: Path) -> Path:
    """A tiny model whose weights have outliers, as trained ones do, and whose biases matter."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(tokenizer, folder)
    config = AutoConfig.for_model(architecture, **COMMON, **OWN[architecture])
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


def changed(
    model: Path, folder: Path, weights: Change | None = None, config: Change | None = None
) -> Path:
    """A copy of a directory, its tensors or its config changed in place."""
    shutil.copytree(model, folder)
    stored = load_file(folder / "model.safetensors")
    if weights is not None:
        weights(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        said = json.loads((folder / "config.json").read_text())
        config(said)
        (folder / "config.json").write_text(json.dumps(said))
    return folder


def located(reference: Path, candidate: Path, out: Path, **options: object) -> Record:
    shutil.rmtree(out, ignore_errors=True)
    options.setdefault("runtime", False)
    config = LocateConfig(
        reference=reference,
        candidate=candidate,
        out=out,
        data=("builtin:validation-quick",),
        max_tokens=40,
        **options,  # type: ignore[arg-type]
    )
    return locate(config)


def wrong(record: Record) -> list[OperationRow]:
    return LocateMetrics.of(record).wrong


def places(record: Record) -> set[tuple[int | None, str]]:
    """(layer, operation) of all that is not explained."""
    return {(row.layer, row.operation) for row in wrong(record)}


def with_tensors(file: Path, path: Path, **changes: Callable[[np.ndarray], np.ndarray]) -> Path:
    """A copy of a GGUF in which some tensors hold other values, encoded in their types.

    ``changes``: the tensor's name with ``__`` for dots → what is done to its values.
    """
    content = bytearray(file.read_bytes())
    tensors = open_gguf(file).tensors
    for name, change in changes.items():
        tensor = tensors[name.replace("__", ".")]
        packed = _packed(change(tensor.values().copy()), tensor)
        assert len(packed) == tensor.bytes
        content[tensor.offset : tensor.offset + tensor.bytes] = packed
    path.write_bytes(content)
    return path


def _packed(values: np.ndarray, tensor: GGUFTensor) -> bytes:
    matrix = np.ascontiguousarray(values.reshape(-1, tensor.shape[-1]), dtype=np.float32)
    if tensor.type in ("F32", "F16", "BF16"):
        return np.ascontiguousarray(stored_as(matrix, tensor.type)).tobytes()
    return encode(matrix, tensor.type).tobytes()


def exchanged(file: Path, path: Path, one: str, other: str) -> Path:
    """A copy of a GGUF in which all tensors of two layers have changed places."""
    content = bytearray(file.read_bytes())
    tensors = open_gguf(file).tensors
    for name, first in tensors.items():
        if not name.startswith(one):
            continue
        second = tensors[name.replace(one, other, 1)]
        assert first.type == second.type
        for here, there in ((first, second), (second, first)):
            content[here.offset : here.offset + here.bytes] = there.raw.tobytes()
    path.write_bytes(content)
    return path
