"""What a configuration of transformers 5 leaves unsaid, and the converter then assumes in silence.

A key that the converter demands it asks for by failing (``llama.config_keys``). Others it reads if
they are there and leaves out if not; the file then loads as something else, or not at all. Each of
these is read off what transformers itself makes of the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from so8tqc.checkpoints.safetensors_index import Checkpoint
from so8tqc.checkpoints.skeleton import Skeleton, skeleton

_SCORES = (
    "score_function",
    "scoring_func",
    "score_func",
    "moe_router_activation",
    "moe_router_activation_func",
    "expert_selection_fn",
)
"""Names under which the converter looks for the function of a router's scores."""

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_OLDER_LAYER_TYPES = {"linear_attention": "mamba", "full_attention": "attention"}
_TOKENS = 3


def unasked(checkpoint: Checkpoint) -> dict[str, Any]:
    """Keys for the converter that the model means and its configuration does not say.

    A type that transformers does not know has none.
    """
    built = skeleton(checkpoint)
    if built is None:
        return {}
    config = built.model.config.get_text_config(decoder=True)
    said = config.to_dict()
    found: dict[str, Any] = {}
    if not any(said.get(key) for key in _SCORES) and (scores := router_scores(built, said)):
        found["scoring_func"] = scores
    for key, say in _UNSAID.items():
        if said.get(key) is None and (value := say(said)) is not None:
            found[key] = value
    if said.get("model_type") == "granitemoehybrid":
        found["layer_types"] = [_OLDER_LAYER_TYPES.get(t, t) for t in said["layer_types"]]
    return found


def router_scores(built: Skeleton, config: Mapping[str, Any]) -> str | None:
    """``sigmoid`` or ``softmax``: what the model's own routers make of their scores.

    Its forward is run without weights until an expert would have to be chosen; what was applied to
    as many values as there are experts is noted. None where that is neither, or both.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    experts = next((n for key in _EXPERTS if isinstance(n := config.get(key), int)), 0)
    if experts <= _TOKENS:  # attention's own softmax would look the same
        return None
    applied: set[str] = set()

    class Noting(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = getattr(func, "__name__", "")
            shape = tuple(getattr(args[0], "shape", ())) if args else ()
            if name in ("sigmoid", "softmax") and shape[-1:] == (experts,):
                applied.add(name)
            return func(*args, **(kwargs or {}))

    ids = torch.zeros((1, _TOKENS), dtype=torch.long, device="meta")
    # which expert is chosen needs weights: there each type stops in its own way
    with suppress(Exception), torch.inference_mode(), Noting():
        built.model(input_ids=ids)
    return applied.pop() if len(applied) == 1 else None


def _leading_dense(config: Mapping[str, Any]) -> int | None:
    kinds = config.get("mlp_layer_types")
    if not isinstance(kinds, Sequence) or set(kinds) - {"dense", "sparse"}:
        return None
    dense = next((i for i, kind in enumerate(kinds) if kind != "dense"), len(kinds))
    return dense if "dense" not in kinds[dense:] else None  # elsewhere it would say another model


def _attention_rotary(config: Mapping[str, Any]) -> int | None:
    part = (config.get("rope_parameters") or {}).get("partial_rotary_factor")
    if config.get("model_type") != "bamba" or part is None:
        return None
    return int(part * config["hidden_size"] // config["num_attention_heads"])


def _global_head_dim(config: Mapping[str, Any]) -> int | None:
    if not str(config.get("model_type")).startswith("gemma4"):
        return None
    own = [layer.get("head_dim") for layer in (config["per_layer_config"] or {}).values()]
    return None if any(own) else config.get("head_dim")


def _part_that_turns(config: Mapping[str, Any]) -> float | None:
    if not str(config.get("model_type")).startswith(("glm", "solar_open")):
        return None
    rope = config.get("rope_parameters") or {}
    return None if "partial_rotary_factor" in rope else 1.0  # half, if nobody says it


def _parts_that_turn(config: Mapping[str, Any]) -> list[float] | None:
    rope = config.get("rope_parameters") or {}
    kinds = config.get("layer_types") or ()
    if config.get("model_type") != "step3p5" or not set(kinds) <= rope.keys():
        return None
    return [rope[kind].get("partial_rotary_factor", 1.0) for kind in kinds]


def _layers_with_experts(config: Mapping[str, Any]) -> str | None:
    if config.get("model_type") != "step3p5":
        return None
    kinds = config.get("mlp_layer_types") or ()
    return ",".join(str(i) for i, kind in enumerate(kinds) if kind == "sparse")


def _normalized_by(model_type: str) -> Callable[[Mapping[str, Any]], bool | None]:
    """Of a type of which transformers always divides the chosen experts' weights by their sum."""
    return lambda config: True if config.get("model_type") == model_type else None


_UNSAID: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "first_k_dense_replace": _leading_dense,
    "attn_rotary_emb": _attention_rotary,
    "global_head_dim": _global_head_dim,
    "partial_rotary_factor": _part_that_turns,
    "partial_rotary_factors": _parts_that_turn,
    "moe_layers_enum": _layers_with_experts,
    "route_norm": _normalized_by("afmoe"),
    "norm_expert_weight": _normalized_by("step3p5"),
}
"""Key → what the rest of the configuration says of it; None: nothing."""
