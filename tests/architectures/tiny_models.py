"""A tiny random model of any text-generation type that transformers knows.

Every count and width of a type's own configuration is made small by its name; what a type cannot
bear is corrected in ``OWN``. A new type of a new transformers needs no line here, unless its
configuration names things as none before.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

LAYERS = 4
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "dim", "embedding_size"), 96),
    **dict.fromkeys(("word_embed_proj_dim", "lm_head_hidden_size"), 96),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "n_inner",
            "ffn_hidden_size",
            "intermediate_size_mlp",
            "decoder_ffn_dim",
            "ffw_size",
            "block_ff_dim",
            "d_ff",
            "dense_intermediate_size",
        ),
        128,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "expert_ffn_hidden_size",
            "moe_shared_expert_intermediate_size",
            "shared_intermediate_size",
        ),
        64,
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads", "n_head_kv"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_dim"), 32),
    **dict.fromkeys(
        (
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
            "num_moe_experts",
        ),
        4,
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "moe_top_k"), 2
    ),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("first_k_dense_replace",), 1),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length"),
        512,
    ),
    "sliding_window": 64,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "o_lora_rank": 16,
    "o_groups": 2,
    "mamba_n_heads": 6,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 192,
    "mamba_num_heads": 6,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "n_groups": 1,
    "mamba_expand": 2,
    "mamba_headdim": 32,
    "n_mamba_heads": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "index_n_heads": 4,
    "index_head_dim": 128,
    "index_topk": 64,
    "vocab_size_per_layer_input": 512,
    "num_kv_shared_layers": 0,
    "global_head_dim": 64,
    "image_size": 28,
    "patch_size": 14,
    "num_nextn_predict_layers": 0,
    "mtp_num_hidden_layers": 0,
    "use_cache": True,
    "num_channels": 3,
    "query_pre_attn_scalar": 32,
    "conv_L_cache": 3,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "routed_scaling_factor": 1.0,
    "num_mem_blocks": 1,
    "adapter_rank": 8,
    "num_query_groups": 4,
    # what the forward does besides must show
    "lm_head_multiplier": 0.5,
    "embedding_multiplier": 2.0,
    "attention_out_multiplier": 0.7,
    "key_multiplier": 0.6,
    "ssm_in_multiplier": 0.8,
    "ssm_out_multiplier": 0.9,
    "logits_scaling": 3.0,
    "logit_scale": 0.25,
    "residual_multiplier": 0.5,
    "rotary_dim": 16,
    "router_logit_softcapping": 30.0,
    "final_logit_softcapping": 30.0,
    "out_hidden_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "lru_width": 96,
    "attention_window_size": 64,
    "max_window_layers": 4,
    "shared_expert_num": 1,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 32,
    "swa_v_head_dim": 32,
    "d_state": 16,
    "attention_hidden_size": 192,
    "expert_layer_period": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "time_step_rank": 8,
    "mamba_dt_rank": 8,
}
"""Key of a configuration → its small value."""

_HYBRID = ["linear_attention", "full_attention"] * (LAYERS // 2)
_RECURRENT_THREE = ["linear_attention"] * 3 + ["full_attention"]
_SECTIONS = (
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "glm4v_text",
    "glm46v_text",
    "glm4v_moe_text",
    "glm_ocr_text",
    "paddleocr_vl_text",
    "glmga_text",
    "hunyuan_vl_text",
    "qwen3_vl_text",
    "qwen3_vl_moe_text",
)
"""Text models whose rope is divided among time, height and width."""

OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "dbrx": {
        "ffn_config": {
            "ffn_hidden_size": 128,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": 96,
        },
        "attn_config": {"kv_n_heads": 2},
    },
    # libllama and the converter hold fixed what all released models of a type have in common
    "falcon": {
        "ffn_hidden_size": 384,
        "num_kv_heads": 4,
        "new_decoder_architecture": False,
        "multi_query": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "gpt_neox": {"intermediate_size": 128},
    "zamba2": {
        "num_hidden_layers": 6,
        "layer_types": ["linear_attention", "hybrid"] * 3,
        "hybrid_layer_ids": [1, 3, 5],
        "num_key_value_heads": 4,
        "attention_head_dim": 48,
        "use_mamba_kernels": False,
    },
    "olmo_hybrid": {"layer_types": _RECURRENT_THREE},
    "qwen3_next": {"layer_types": _RECURRENT_THREE},
    "qwen3_5_text": {"layer_types": _RECURRENT_THREE},
    "qwen3_5_moe_text": {"layer_types": _RECURRENT_THREE},
    "minimax": {"layer_types": _HYBRID},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "window_size": 64},
    "gpt2": {"n_inner": None},
    "gpt-sw3": {"n_inner": None},
    "gpt_bigcode": {"n_inner": 384},
    "glm": {"head_dim": 24},
    "nemotron": {"head_dim": 24},
    "afmoe": {"mup_enabled": True},
    "bitnet": {"tie_word_embeddings": True},
    "ernie4_5_moe": {"intermediate_size": 256},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * LAYERS},
    "gemma3": {"final_logit_softcapping": None},
    "gemma3_text": {"final_logit_softcapping": None},
    "gemma3n_text": {
        "hidden_size_per_layer_input": 256,
        "activation_sparsity_pattern": [0.95] * LAYERS,
    },
    "gemma4_text": {"global_head_dim": 64, "num_experts": None},
    "gemma4_unified_text": {"global_head_dim": 64},
    "kimi_linear": {
        "q_lora_rank": None,
        "first_k_dense_replace": 0,
        "layer_types": _RECURRENT_THREE,
    },
    "laguna": {"layer_types": ["full_attention"] + ["sliding_attention"] * 3},
    "mellum": {
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 5e5}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "minimax_m3_vl_text": {
        "index_n_heads": 2,
        "rotary_dim": 32,
        "shared_intermediate_size": 128,
        "layer_types": ["full_attention"] + ["minimax_m3_sparse"] * 3,
        "mlp_layer_types": ["dense"] + ["sparse"] * 3,
    },
    "phi": {"num_key_value_heads": 4, "intermediate_size": 384},
    "olmoe": {"num_key_value_heads": 4},
    "qwen3_moe": {"norm_topk_prob": True},
    "step3p5": {
        "layer_types": ["full_attention"] + ["sliding_attention"] * 3,
        "mlp_layer_types": ["dense"] + ["sparse"] * 3,
        "share_expert_dim": 64,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "cohere2": {"head_dim": 24},
    "jamba": {"use_mamba_kernels": False},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe", "mamba"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_hidden_layers": 4},
}
"""Type → what its configuration needs besides."""


LARGEST = 30_000_000
"""Parameters; a part whose size no key of ``_SIZES`` governs may ask for billions."""


def types() -> dict[str, str]:
    """Every text-generation type of the installed transformers → the name of its model class."""
    from transformers.models.auto import modeling_auto

    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    seeing = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return dict(sorted({**seeing, **causal}.items()))


def small(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a configuration that make a model large → small values, parts included."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key == "per_layer_config":
            continue  # made of the other keys
        if isinstance(value, dict) and key.endswith("_config") and value:
            found[key] = {"model_type": value["model_type"]} if "model_type" in value else {}
            found[key] |= small(value) | (OWN.get(str(value.get("model_type"))) or {})
        elif isinstance(value, dict) and "mrope_section" in value:
            half = _SIZES["head_dim"] // 2
            found[key] = value | {"mrope_section": [half // 4, half - 2 * (half // 4), half // 4]}
        elif key in _SIZES and not isinstance(value, list | dict | bool):
            found[key] = _SIZES[key]
    if "qk_rope_head_dim" in config and "head_dim" in found:
        found["head_dim"] = _SIZES["qk_rope_head_dim"]  # rope turns this part alone
    if "kv_lora_rank" in config:
        found["num_key_value_heads"] = _SIZES["num_attention_heads"]
    if "mrope" in str(config.get("model_type")) or str(config.get("model_type")) in _SECTIONS:
        part = 0.5 if str(config.get("model_type")).startswith("glm") else 1.0
        half = int(part * (found.get("head_dim") or 24)) // 2
        found["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
            **({} if part == 1.0 else {"partial_rotary_factor": part}),
        }
    return found


def configuration(kind: str, vocabulary: int) -> Any:
    """The small configuration of a type."""
    from transformers import AutoConfig

    known = AutoConfig.for_model(kind).to_dict()
    values = small(known) | OWN.get(kind, {})
    for part in (values, *(v for v in values.values() if isinstance(v, dict))):
        if part is values or "hidden_size" in part or "model_type" in part:
            part["vocab_size"] = vocabulary
    values = {k: v for k, v in values.items() if v is not None or k in OWN.get(kind, {})}
    return AutoConfig.for_model(kind, **values)


def build(
    kind: str, directory: Path, tokenizer: Path, vocabulary: int, dtype: str = "float32"
) -> Any:
    """Save a small model of a type with a tokenizer; return its configuration.

    Raises:
        Exception: whatever the type's own code says of the small configuration.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging

    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = configuration(kind, vocabulary)
        causal = type(config) in AutoModelForCausalLM._model_mapping
        auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
        with torch.device("meta"):
            size = sum(p.numel() for p in auto.from_config(config).parameters())
        if size > LARGEST:
            raise ValueError(f"{size:,} parameters: what makes this type large is not known here")
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:  # livelier than the default 0.02: attention must matter
                width = parameter.shape[0 if "c_" in name.split(".")[-2] else 1]
                parameter.data.normal_(std=width**-0.5)
            elif parameter.ndim == 3:
                parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight.data[module.padding_idx] = 0  # as no training changes it
        model.to(getattr(torch, dtype)).save_pretrained(str(directory))
    for file in tokenizer.iterdir():
        shutil.copy(file, directory / file.name)
    return model.config


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
