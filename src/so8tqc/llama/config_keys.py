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

_MISSING = re.compile(r"KeyError: (?:\"could not find any of: \[(?P<many>.+)\]\"|'(?P<one>\w+)')")

_OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "n_ctx": ("n_positions", "max_position_embeddings"),
    "n_positions": ("max_position_embeddings", "n_ctx"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "n_ctx"),
    "rms_norm_eps": ("norm_eps", "layer_norm_epsilon"),
    "layer_norm_eps": ("layer_norm_epsilon", "norm_eps", "rms_norm_eps"),
    "swa_head_dim": ("head_dim",),
    "swa_v_head_dim": ("v_head_dim",),
    "swa_num_attention_heads": ("num_attention_heads",),
    "swa_num_key_value_heads": ("num_key_value_heads",),
    "moe_intermediate_size": ("intermediate_size",),
    "n_routed_experts": ("num_local_experts", "num_experts"),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "num_local_experts": ("num_experts", "n_routed_experts"),
    "num_experts_per_tok": ("moe_topk", "moe_k", "num_experts_per_token"),
    "moe_topk": ("num_experts_per_tok",),
}
"""Key → other names of the same thing, the likeliest first."""


def missing_keys(message: str) -> list[str]:
    """Keys of which the converter's last words say that it needs one; [] if they say no such."""
    match = _MISSING.search(message)
    if match is None:
        return []
    return re.findall(r"\w+", match["many"] or match["one"])


def derived(key: str, config: Mapping[str, Any], model: Path) -> Any:  # noqa: PLR0911  a case each
    """What a missing key of a text config stands for; None if the config does not say."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "full_attention" in rope:
        rope = rope["full_attention"]
    if key in rope:
        return rope[key]
    own = _of_transformers(model)
    head = config.get("head_dim") or getattr(own, "head_dim", None) or _head_dim(config)
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    match key:
        case "rotary_pct" | "partial_rotary_factor":
            return 1.0 if part is None else part  # all of a head's features, in transformers, too
        case "rotary_dim" | "rope_dim":
            return head and int(head * (1.0 if part is None else part))
        case "rotary_emb_base" | "rotary_base":
            return rope.get("rope_theta")
        case "head_dim":
            return head
    for other in (key, *_OTHER_NAMES.get(key, ())):
        value = config.get(other, getattr(own, other, None))
        if value is not None and not callable(value):
            return value
    return None


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
