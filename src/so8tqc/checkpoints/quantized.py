"""Bases whose weights are stored quantized, told by their name: config first, then tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from so8tqc.checkpoints.safetensors_index import Checkpoint
from so8tqc.errors import ModelError

_METHODS = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "eetq": "EETQ",
    "fbgemm_fp8": "FBGEMM FP8 (row scales)",
    "fouroversix": "Four Over Six",
    "fp_quant": "FP-Quant",
    "gemma": "Gemma's own",
    "gguf": "GGUF",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "metal": "Metal",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "quanto": "Quanto",
    "quark": "Quark",
    "sinq": "SINQ",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
"""``quant_method`` → its true name; of transformers 5.23."""

_USUAL_BITS = {"gptq": 4, "awq": 4}
_BIT_KEYS = ("bits", "w_bit", "nbits", "nbits_per_codebook")

_MARKS = {
    "qweight": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors (packed)",
    "SCB": "bitsandbytes 8-bit (LLM.int8)",
    "quant_map": "bitsandbytes 4-bit",
    "weight_scale_inv": "FP8 (block scales)",
    "W_q": "HQQ",
}
"""Ends of tensors' names that only quantized checkpoints have, where the config says nothing."""


def quantization_settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """``quantization_config``, of the model or its text tower; None: there is none."""
    said = config.get("quantization_config")
    if not isinstance(said, dict):
        text = config.get("text_config")
        said = text.get("quantization_config") if isinstance(text, dict) else None
    return said if isinstance(said, dict) else None


def quantization_name(config: Mapping[str, Any], names: Iterable[str] = ()) -> str | None:
    """What a checkpoint's weights are, e.g. ``bitsandbytes 4-bit (nf4)``; None: not quantized.

    Args:
        config: of the model; what its ``quantization_config`` says comes first.
        names: of its tensors.
    """
    if (said := quantization_settings(config)) is not None:
        return _named(said)
    ends = {name.rsplit(".", 1)[-1] for name in names}
    return next((method for end, method in _MARKS.items() if end in ends), None)


def _named(said: Mapping[str, Any]) -> str:
    method = str(said.get("quant_method", "")).lower()
    if method in ("bitsandbytes", "") and (said.get("load_in_4bit") or said.get("_load_in_4bit")):
        return f"bitsandbytes 4-bit ({said.get('bnb_4bit_quant_type', 'fp4')})"
    if method in ("bitsandbytes", "") and (said.get("load_in_8bit") or said.get("_load_in_8bit")):
        return "bitsandbytes 8-bit (LLM.int8)"
    if method == "fp8":
        block = said.get("weight_block_size")
        pair = isinstance(block, (list, tuple)) and len(block) == 2
        scales = f"block scales {'×'.join(map(str, block or ()))}" if pair else "scaled"
        return f"FP8 ({said.get('fmt', 'e4m3')}, {scales})"
    if method == "compressed-tensors":
        return f"compressed-tensors {_scheme(said)}"
    return (_METHODS.get(method) or method or "an unnamed method") + _detail(method, said)


def _detail(method: str, said: Mapping[str, Any]) -> str:
    """How wide the weights are, as far as the method's own entries say."""
    inner = said.get("quant_config")
    weights = inner.get("weight_quant_params") if isinstance(inner, dict) else None
    places: list[Mapping[str, Any]] = [p for p in (said, inner, weights) if isinstance(p, dict)]
    for place in places:
        for key in _BIT_KEYS:
            if isinstance(bits := place.get(key), int):
                return f" {bits}-bit"
    if method in _USUAL_BITS:
        return f" {_USUAL_BITS[method]}-bit"
    kind = said.get("weights", said.get("quant_type"))
    return f" ({kind})" if isinstance(kind, str) else ""


def require_unquantized(checkpoint: Checkpoint) -> None:
    """Refuse a base whose matrices are quantized: no fold of them can be stored as they are.

    Raises:
        ModelError: naming the method.
    """
    name = quantization_name(checkpoint.config, checkpoint.tensors)
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
