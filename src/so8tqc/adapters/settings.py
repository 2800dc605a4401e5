"""Which settings of ``adapter_config.json`` are understood, for each method; the rest is refused.

An entry that is not listed may change what the adapter computes: it is refused by name unless it is
empty or off. Entries of ``_NEUTRAL`` say where an adapter came from, on which modules it was put
(its tensors say that, too), or how it was trained and initialised.
"""

from __future__ import annotations

from so8tqc.adapters.files import AdapterFiles
from so8tqc.errors import RotationError
from so8tqc.rotations.files.peft_config import CONFIG_NAME

_NEUTRAL = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_weights",
        "peft_type",
        "peft_version",
        "fan_in_fan_out",
        "bias",
        "modules_to_save",
    }
)
_LYCORIS = frozenset(
    {"r", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "module_dropout"}
)
_UNDERSTOOD: dict[str, frozenset[str]] = {
    "LORA": frozenset(
        {
            "r",
            "lora_alpha",
            "rank_pattern",
            "alpha_pattern",
            "use_rslora",
            "use_dora",
            "lora_bias",
            "target_parameters",
            "lora_dropout",
            "init_lora_weights",
            "loftq_config",
            "eva_config",
            "corda_config",
            "lora_ga_config",
            "megatron_core",
            "qalora_group_size",
            "runtime_config",
            "ensure_weight_tying",
            "target_modules_to_tie",
            "trainable_token_indices",
        }
    ),
    "OFT": frozenset(
        {
            "r",
            "oft_block_size",
            "coft",
            "eps",
            "block_share",
            "use_cayley_neumann",
            "num_cayley_neumann_terms",
            "module_dropout",
        }
    ),
    "BOFT": frozenset(
        {"boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"}
    ),
    "HRA": frozenset({"r", "apply_GS"}),
    "PSOFT": frozenset(
        {
            "r",
            "psoft_alpha",
            "psoft_dropout",
            "ab_svd_init",
            "psoft_svd",
            "psoft_svd_lowrank_niter",
            "random_seed",
            "psoft_orth",
            "psoft_mag_b",
            "psoft_mag_a",
            "use_cayley_neumann",
            "num_cayley_neumann_terms",
            "cayley_neumann_eps",
        }
    ),
    "ROAD": frozenset({"variant", "group_size"}),
    "VERA": frozenset({"r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial"}),
    "PVERA": frozenset(
        {
            "r",
            "projection_prng_key",
            "save_projection",
            "pvera_dropout",
            "d_initial",
            "sample_at_inference",
            "generator_seed",
        }
    ),
    "ADALORA": frozenset(
        {
            "r",
            "init_r",
            "target_r",
            "lora_alpha",
            "rank_pattern",
            "tinit",
            "tfinal",
            "deltaT",
            "beta1",
            "beta2",
            "total_step",
            "orth_reg_weight",
            "trainable_token_indices",
            "ensure_weight_tying",
            "lora_dropout",
            "init_lora_weights",
            "loftq_config",
            "megatron_core",
            "qalora_group_size",
            "runtime_config",
        }
    ),
    "LOHA": _LYCORIS | {"use_effective_conv2d"},
    "LOKR": _LYCORIS
    | {"use_effective_conv2d", "decompose_both", "decompose_factor", "rank_dropout_scale"},
    "IA3": frozenset({"feedforward_modules", "init_ia3_weights"}),
    "LN_TUNING": frozenset(),
    "BEFT": frozenset(),
    "MISS": frozenset({"r", "miss_dropout", "mini_r"}),
    "SHIRA": frozenset({"r", "mask_type", "random_seed"}),
    "C3A": frozenset({"block_size", "block_size_pattern"}),
    "DELORA": frozenset({"r", "delora_lambda", "module_dropout", "rank_pattern", "lambda_pattern"}),
    "HIRA": frozenset({"r", "hira_dropout", "rank_pattern"}),
    "GRALORA": frozenset({"r", "hybrid_r", "alpha", "gralora_dropout", "gralora_k"}),
    "RANDLORA": frozenset(
        {
            "r",
            "projection_prng_key",
            "save_projection",
            "sparse",
            "very_sparse",
            "randlora_dropout",
            "randlora_alpha",
        }
    ),
    "VBLORA": frozenset(
        {
            "r",
            "num_vectors",
            "vector_length",
            "topk",
            "save_only_topk_weights",
            "vblora_dropout",
            "init_vector_bank_bound",
            "init_logits_std",
        }
    ),
    "FOURIERFT": frozenset({"n_frequency", "scaling", "random_loc_seed", "n_frequency_pattern"}),
    "WAVEFT": frozenset(
        {
            "n_frequency",
            "scaling",
            "wavelet_family",
            "use_idwt",
            "random_loc_seed",
            "n_frequency_pattern",
            "proportional_parameters",
        }
    ),
    "TRAINABLE_TOKENS": frozenset({"token_indices"}),
}

_IN_FRONT = "it puts learned tokens or cached keys in front of the input, which no weight can hold"
_MIXED = "it weighs several LoRAs by the input, which no weight can hold"
_NO_WEIGHT = {
    "PROMPT_TUNING": _IN_FRONT,
    "MULTITASK_PROMPT_TUNING": _IN_FRONT,
    "P_TUNING": _IN_FRONT,
    "PREFIX_TUNING": _IN_FRONT,
    "CPT": _IN_FRONT,
    "CARTRIDGE": _IN_FRONT,
    "ADAPTION_PROMPT": "its layers attend to learned prompts besides, which no weight can hold",
    "XLORA": _MIXED,
    "POLY": _MIXED,
    "LILY": "its router weighs its factors by the input, which no weight can hold",
}
"""Methods that change no weight, and why."""

_INITS_THAT_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


def require_understood(files: AdapterFiles) -> None:
    """Refuse a method that has no fold here, and settings that are not understood.

    Raises:
        RotationError: naming them.
    """
    where = str(files.directory / CONFIG_NAME)
    if files.kind not in _UNDERSTOOD:
        raise _refused(files, where)
    known = _UNDERSTOOD[files.kind] | _NEUTRAL
    unknown = sorted(key for key in files.config.keys() - known if files.config[key])
    if unknown:
        raise RotationError(
            "the adapter has settings that are not understood: "
            + ", ".join(f"{key}={files.config[key]!r}" for key in unknown),
            where=where,
            remedy="They may change what the adapter computes: merge it with PEFT instead.",
        )
    init = str(files.config.get("init_lora_weights", ""))
    if init.lower().startswith(_INITS_THAT_CHANGE_THE_BASE):
        raise RotationError(
            f"the adapter was initialised by {init}, which takes its first B·A out of the base: it "
            "belongs to what was left of the base, not to the base itself",
            where=where,
            remedy="Convert it: PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion gives a LoRA of the base. Or give the base "
            "that was left, if the training saved it, and set init_lora_weights to true in this "
            "file, as PEFT's own guide does.",
        )


def _refused(files: AdapterFiles, where: str) -> RotationError:
    """Why a method has no fold here."""
    kind = files.kind
    if (reason := _NO_WEIGHT.get(kind)) is not None:
        return RotationError(
            f"the adapter is {kind}: {reason}",
            where=where,
            remedy="Serve it with PEFT; nothing can be baked from it.",
        )
    return RotationError(
        f"the adapter is {files.config.get('peft_type')!r}, whose change of a weight is not known "
        "here in closed form, so that it cannot be baked",
        where=where,
        remedy=f"Those that can: {', '.join(_UNDERSTOOD)}. Merge others with PEFT first.",
    )
