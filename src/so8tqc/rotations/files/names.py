"""Names of tensors as trainings save them: wrapper levels, layers, and what looks like a gate."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from so8tqc.rotations.rotation_set import Target

_WRAPPERS = frozenset(
    {
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
        "_fpw_module",
        "module",
    }
)
"""Levels that torch.compile, FSDP, activation checkpointing, DeepSpeed and DDP put into names."""

_PEFT = re.compile(r"(?:(?<=\.)|^)base_model\.(?:model\.)?")
_PEFT_INSIDE = re.compile(
    r"(?:^|\.)base_model\.model\.(?:model|transformer|gpt_neox|language_model|lm_head|embed_out)\."
)
_HELD = ("model.model.", "model.lm_head.", "model.transformer.")
_LAYER = re.compile(r"^(?P<prefix>(?:.+?\.)?)(?:layers|h|blocks)\.(?P<layer>\d+)\.(?P<rest>.+)$")
_NUMBERED = re.compile(
    r"^(?:.+\.)?(?:layers?[._]?|\w*(?:gate|rotation|so8|theta)\w*[._])(\d+)(?:\.[A-Za-z]\w*)?$"
    r"|^(\d+)$"
)
_GATE_WORDS = ("theta", "rotation", "so8", "gate")
_NO_GATE = frozenset({"gate_proj", "gate_up_proj", "up_gate_proj", "gate_projs"})
_ATTENTIONS = frozenset({"self_attn", "attn", "self_attention", "attention", "self_attn_layer"})
_OUTPUTS = frozenset({"o_proj", "out_proj", "c_proj", "dense", "wo"})
_MANY = 12
"""Keys that a message lists."""


def unwrapped(keys: Collection[str]) -> dict[str, str]:
    """key → its name without the levels that wrappers add.

    ``base_model.model.`` is PEFT's where the names go on as a whole model's do; else
    ``base_model.`` is the level of a class that holds the model beside heads of its own. So is a
    ``model.`` above a whole model's own names.
    """
    inside = {key: _without_wrappers(key) for key in keys}
    levels = 2 if any(_PEFT_INSIDE.search(name) for name in inside.values()) else 1
    plain = {key: _without_base_model(name, levels) for key, name in inside.items()}
    if any(name.startswith(_HELD) for name in plain.values()):
        return {key: name.removeprefix("model.") for key, name in plain.items()}
    return plain


def layer_of(name: str) -> tuple[str, int, str] | None:
    """(prefix, layer, what follows) of an unwrapped name; None if it belongs to no layer."""
    match = _LAYER.match(name)
    return None if match is None else (match["prefix"], int(match["layer"]), match["rest"])


def numbered(name: str) -> int | None:
    """N of ``layer_N``, of ``N`` alone, and of the N-th entry of a list of gates."""
    match = _NUMBERED.match(name)
    return None if match is None else int(match[1] or match[2])


def looks_like_a_gate(name: str) -> bool:
    """Whether a name has one of the words that gates are called by."""
    parts = (part.lower() for part in name.split("."))
    return any(part not in _NO_GATE and any(word in part for word in _GATE_WORDS) for part in parts)


def is_certainly_a_gate(name: str) -> bool:
    """Whether a name has a word that no part of a language model's own is called by."""
    *_, leaf = parts = name.lower().split(".")
    return leaf == "theta" or any("so8" in part or "rotation" in part for part in parts)


def gate_like(keys: Iterable[str]) -> str:
    """The keys that look like gates, for a message."""
    keys = list(keys)
    if not keys:
        return "found nothing"
    found = [key for key in keys if looks_like_a_gate(key)]
    if not found:
        return f"none of its {len(keys)} keys looks like a gate's"
    more = f" and {len(found) - _MANY} more" if len(found) > _MANY else ""
    return "keys that look like gates: " + ", ".join(found[:_MANY]) + more


def target_of(layer: int, rest: str) -> Target | None:
    """Which projection a gate belongs to, by its name below the layer; None if it does not say.

    A gate of the layer itself, or of its attention, is the attention output's.
    """
    above = rest.split(".")[:-1]  # the leaf is theta
    for end, part in enumerate(above):
        if part in _OUTPUTS and (end == 0 or above[end - 1] in _ATTENTIONS):
            return Target(layer)
        if part.endswith("_proj"):
            return Target(layer, ".".join(above[: end + 1]))
    parents = above[:-1]
    if not parents or parents[-1] in _ATTENTIONS:
        return Target(layer)
    return None


def key_pattern(text: str) -> re.Pattern[str]:
    """What ``--key`` names, as an expression whose first group is the layer, if it has one.

    With a parenthesis it is a regular expression already. Else ``{layer}`` (or any word in
    braces; or a level that is N alone; or the first that is * alone) stands for the number of the
    layer, every other * for anything.

    Raises:
        re.error: it is no regular expression.
    """
    if "(" in text:
        return re.compile(text)
    parts = re.split(r"\{\w*\}", text, maxsplit=1)
    if len(parts) == 1:
        levels = text.split(".")
        marks = [mark for mark in ("N", "*") if mark in levels]
        spot = levels.index(marks[0]) if marks else None
        if spot is not None:
            before, after = ".".join(levels[:spot]), ".".join(levels[spot + 1 :])
            parts = [before + ("." if before else ""), ("." if after else "") + after]
    pieces = [re.escape(part).replace(r"\*", ".*") for part in parts]
    return re.compile(r"(?:.*\.)?" + r"(\d+)".join(pieces))


def _without_wrappers(key: str) -> str:
    parts = key.split(".")
    kept = [part for part in parts if part not in _WRAPPERS]
    return ".".join(kept) if kept else key


def _without_base_model(name: str, levels: int) -> str:
    if levels == 2:
        return _PEFT.sub("", name)
    return re.sub(r"(?:(?<=\.)|^)base_model\.", "", name)
