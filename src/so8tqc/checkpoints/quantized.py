"""Bases whose weights are stored quantized: told by their true name, read from the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from so8tqc.checkpoints.safetensors_index import Checkpoint
from so8tqc.errors import ModelError


def quantization_name(config: Mapping[str, Any]) -> str | None:
    """What ``quantization_config`` says the weights are, e.g. ``bitsandbytes 4-bit (nf4)``.

    None: the checkpoint says nothing of the kind.
    """
    said = config.get("quantization_config")
    if not isinstance(said, dict):
        text = config.get("text_config")
        said = text.get("quantization_config") if isinstance(text, dict) else None
    if not isinstance(said, dict):
        return None
    return _named(said)


def _named(said: Mapping[str, Any]) -> str:
    method = str(said.get("quant_method", "")).lower()
    bits = said.get("bits") or said.get("w_bit")
    if method in ("bitsandbytes", "") and (said.get("load_in_4bit") or said.get("_load_in_4bit")):
        return f"bitsandbytes 4-bit ({said.get('bnb_4bit_quant_type', 'fp4')})"
    if method in ("bitsandbytes", "") and (said.get("load_in_8bit") or said.get("_load_in_8bit")):
        return "bitsandbytes 8-bit (LLM.int8)"
    if method == "fp8":
        block = said.get("weight_block_size")
        pair = isinstance(block, (list, tuple)) and len(block) == 2
        scales = f"block scales {'×'.join(map(str, block or ()))}" if pair else "scaled"
        return f"FP8 ({said.get('fmt', 'e4m3')}, {scales})"
    if method in ("gptq", "awq"):
        return f"{method.upper()} {bits or 4}-bit"
    if method == "compressed-tensors":
        return f"compressed-tensors {_scheme(said)}"
    return method or "an unnamed method"


def require_unquantized(checkpoint: Checkpoint) -> None:
    """Refuse a base whose matrices are quantized: no fold of them can be stored as they are.

    Raises:
        ModelError: naming the method.
    """
    name = quantization_name(checkpoint.config)
    if name is not None:
        raise ModelError(
            f"the base is quantized: {name}; a bake needs weights that are floating-point numbers",
            where=str(checkpoint.directory / "config.json"),
            remedy="Bake the full-precision checkpoint that it was made from, then quantize the "
            "result. (An adapter that was trained on the quantized weights: see --trained-on.)",
        )


def _scheme(said: Mapping[str, Any]) -> str:
    """W4A16 and the like, from the first group of a compressed-tensors configuration."""
    groups = said.get("config_groups")
    first: object = next(iter(groups.values()), {}) if isinstance(groups, dict) else {}
    if not isinstance(first, dict):
        return str(said.get("format", ""))

    inner: Mapping[str, Any] = first

    def bits(key: str) -> str:
        part = inner.get(key)
        if not isinstance(part, dict):
            return "16"
        letter = "" if part.get("type") == "int" else "fp"
        return f"{letter}{part.get('num_bits', '?')}"

    return (
        f"W{bits('weights')}A{bits('input_activations')} ({said.get('format', 'unknown format')})"
    )
