"""Keys of a config that the converter asks for and transformers no longer writes.

transformers 5 renames keys, drops defaults, and keeps what belongs to the rope in one table; the
converter reads the older spellings. A key that it misses is derived from what the config says, and
given to it as a part of the config that its process reads: the model directory is not touched. What
the config does not say is not made up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
"""Stored tensor → its shape."""

_MISSING = re.compile(r"KeyError: (?:\"could not find any of: \[(?P<many>.+)\]\"|'(?P<one>\w+)')")

_OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "n_ctx": ("n_positions", "max_position_embeddings"),
    "n_positions": ("max_position_embeddings", "n_ctx"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "n_ctx"),
    "rms_norm_eps": ("norm_eps", "layer_norm_epsilon"),
    "layer_norm_eps": ("layer_norm_epsilon", "norm_eps", "rms_norm_eps"),
    "moe_intermediate_size": ("intermediate_size",),
    "n_routed_experts": ("num_local_experts", "num_experts"),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "num_local_experts": ("num_experts", "n_routed_experts"),
    "num_experts_per_tok": ("moe_topk", "moe_k", "num_experts_per_token"),
    "moe_topk": ("num_experts_per_tok",),
    "layernorm_epsilon": ("rms_norm_eps", "layer_norm_eps"),
}
"""Key → other names of the same thing, the likeliest first."""


def given(key: str, value: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What to tell the converter so that it finds a key where it looks for it."""
    rope = config.get("rope_parameters") or {}
    if key == "partial_rotary_factor" and "full_attention" in rope:  # it looks in the rope's table
        return {"rope_parameters": rope | {key: value}}
    return {key: value}


def missing_keys(message: str) -> list[str]:
    """Keys of which the converter's last words say that it needs one; [] if they say no such."""
    match = _MISSING.search(message)
    if match is None:
        return []
    return re.findall(r"\w+", match["many"] or match["one"])


def derived(  # noqa: PLR0911, PLR0912  a case each
    key: str, config: Mapping[str, Any], model: Path, shapes: Shapes
) -> Any:
    """What a missing key of a text config stands for; None if the model does not say.

    Args:
        key: what the converter asks for.
        config: the text model's configuration.
        model: the model directory.
        shapes: of its tensors.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "full_attention" in rope:
        rope = rope["full_attention"]
    if key in rope:
        return rope[key]
    own = _of_transformers(model)
    head = config.get("head_dim") or getattr(own, "head_dim", None) or _head_dim(config)
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    layers = config.get("layer_types") or getattr(own, "layer_types", None) or ()
    mlps = config.get("mlp_layer_types") or getattr(own, "mlp_layer_types", None) or ()
    match key:
        case "rotary_pct" | "partial_rotary_factor":
            return 1.0 if part is None else part  # all of a head's features, in transformers, too
        case "rotary_dim" | "rope_dim":
            return head and int(head * (1.0 if part is None else part))
        case "rotary_emb_base" | "rotary_base":
            return rope.get("rope_theta")
        case "head_dim":
            return head
        case "hybrid_layer_pattern" if layers:
            return [int(kind == "sliding_attention") for kind in layers]
        case "moe_layer_freq" if mlps:
            return [int(kind != "dense") for kind in mlps]
        case "num_hash_layers" if mlps:
            return sum(kind == "hash_moe" for kind in mlps)
        case "compress_ratios" if layers and config.get("compress_rates"):
            return [config["compress_rates"].get(kind, 0) for kind in layers]
        case "topk_method" if any("e_score_correction_bias" in n for n in shapes):
            return "noaux_tc"  # the name of the choice by score and bias
        case "sparse_attention_config" if "index_topk_blocks" in config:
            return {older: config[name] for older, name in _SPARSE_ATTENTION.items()}
        case "n_shared_experts" if shared := config.get("shared_intermediate_size"):
            return shared // config["intermediate_size"] or None
        case "linear_attn_config" if "linear_num_heads" in config:
            return {
                "full_attn_layers": [i + 1 for i, t in enumerate(layers) if t == "full_attention"],
                "kda_layers": [i + 1 for i, t in enumerate(layers) if t != "full_attention"],
                "num_heads": config["linear_num_heads"],
                "head_dim": config["linear_head_dim"],
                "short_conv_kernel_size": config["linear_conv_kernel_dim"],
            }
    if key.startswith("swa_"):
        return _of_sliding_layers(key.removeprefix("swa_"), config, own, shapes)
    for other in (key, *_OTHER_NAMES.get(key, ())):
        value = config.get(other, getattr(own, other, None))
        if value is not None and not callable(value):
            return value
    return None


_SPARSE_ATTENTION = {
    "sparse_num_index_heads": "index_n_heads",
    "sparse_index_dim": "index_head_dim",
    "sparse_block_size": "index_block_size",
    "sparse_topk_blocks": "index_topk_blocks",
    "sparse_local_block": "index_local_blocks",
}
"""Key of the table of older configurations → its name at present."""


def _of_sliding_layers(key: str, config: Mapping[str, Any], own: Any, shapes: Shapes) -> Any:
    """A value of the layers with sliding attention: theirs alone, or that of all layers.

    How many heads their keys have is asked of the weights: a class may double them by itself.
    """
    meant = {} if own is None else own.to_dict()
    kinds = config.get("layer_types") or meant.get("layer_types") or ()
    if key == "num_key_value_heads" and "sliding_attention" in kinds:
        first = kinds.index("sliding_attention")
        keys = f".layers.{first}.self_attn.k_proj.weight"
        rows = [shape[0] for name, shape in shapes.items() if name.endswith(keys)]
        head = config.get("head_dim") or meant.get("head_dim") or _head_dim(config)
        if rows and head:
            return rows[0] // head
    for layer, values in (meant.get("per_layer_config") or {}).items():
        if kinds and kinds[int(layer)] == "sliding_attention" and key in values:
            return values[key]
    return config.get(key, meant.get(key))


def _head_dim(config: Mapping[str, Any]) -> int | None:
    width = config.get("hidden_size") or config.get("n_embd")
    heads = config.get("num_attention_heads") or config.get("n_head")
    return width // heads if isinstance(width, int) and isinstance(heads, int) else None


def _of_transformers(model: Path) -> Any:
    """The text configuration as transformers reads it: with its class's defaults."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            str(model), local_files_only=True, trust_remote_code=False
        )
        return config.get_text_config(decoder=True)
    except Exception:  # noqa: BLE001  a type that transformers does not know says nothing
        return None


def causal_class_of(config: Mapping[str, Any]) -> str | None:
    """The class that transformers has for a text configuration; None if it has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type")))
    return found if isinstance(found, str) else None
