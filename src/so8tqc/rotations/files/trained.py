"""Checkpoints of trainings: which of their tensors are gates, what the names leave no choice about,
and what lies beside the gates.

What is recognised is recognised by names alone, and only where the public training codes that use
these names have one reading:

* an attention wrapped as ``base_attention`` beside a ``rotation_gate``: output, row, scaled-taylor;
* an attention wrapped as ``attention`` beside an ``output_gate``: output, row, cayley;
* a ``so8t_rotation_gate`` in a projection: input, row, cayley, in front of the projection and of
  its LoRA branch;
* a sequence of gate and projection, ``o_proj.0.theta`` and ``o_proj.1.weight``: input, row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from so8tqc.architectures import in_other_tower
from so8tqc.errors import ConfigError, RotationError
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.content import Content, read_content
from so8tqc.rotations.files.names import (
    gate_like,
    is_certainly_a_gate,
    key_pattern,
    layer_of,
    looks_like_a_gate,
    numbered,
    target_of,
    unwrapped,
)
from so8tqc.rotations.files.pt import theta_array
from so8tqc.rotations.files.raw import RawRotations
from so8tqc.rotations.layers import parse_layers
from so8tqc.rotations.options import RotationOptions
from so8tqc.rotations.rotation_set import HEAD, FloatArray, Target

if TYPE_CHECKING:
    import torch

_LISTED = 3
_STRENGTHS = ("alpha", "strength", "scale", "scaling", "mix", "blend", "beta", "gain")
"""How numbers are called that weigh what a gate computes."""


@dataclass(frozen=True)
class _Recognised:
    """What names leave no choice about, and which names these are."""

    by: str
    site: Site
    convention: Convention
    parametrization: Parametrization | None = None


_FAMILIES: dict[tuple[str, str | None], _Recognised] = {
    ("rotation_gate", "base_attention"): _Recognised(
        "self_attn.base_attention beside self_attn.rotation_gate.theta",
        Site.OUTPUT,
        Convention.ROW,
        Parametrization.SCALED_TAYLOR,
    ),
    ("output_gate", "attention"): _Recognised(
        "self_attn.attention beside self_attn.output_gate.theta",
        Site.OUTPUT,
        Convention.ROW,
        Parametrization.CAYLEY,
    ),
    ("0", "1"): _Recognised("o_proj.0.theta in front of o_proj.1", Site.INPUT, Convention.ROW),
}
"""(level of the gate, the only level beside it) → what that is."""

_IN_PROJECTION = _Recognised(
    "so8t_rotation_gate.theta in the projection",
    Site.INPUT,
    Convention.ROW,
    Parametrization.CAYLEY,
)


@dataclass
class _Found:
    """Gates and other tensors, while they are sorted out.

    Attributes:
        theta: target → its parameters' tensor.
        keys: target → key in the file.
        names: target → key without wrapper levels.
        beside: name without wrapper levels → (key, value) of everything else.
        stray: keys of gates that belong to no layer.
    """

    theta: dict[Target, Any]
    keys: dict[Target, str]
    names: dict[Target, str]
    beside: dict[str, tuple[str, Any]]
    stray: dict[str, Any]


def read_trained(path: Path, options: RotationOptions) -> RawRotations:
    """Read the gates of a training checkpoint: a torch or safetensors file, or a directory.

    Raises:
        RotationError: unreadable; a pickle that asks for code, or for more memory than its bytes;
            no gates; two for one projection; gates that do not stand on the way to the logits, or
            nobody knows where; a value that is no dense float tensor [N, b, b] of its own numbers.
        ConfigError: ``options.key`` is no pattern; a tensor without a name, and no layers.
    """
    content = read_content(path)
    if options.key is not None:
        found = _by_key(content, options, path)
    elif "" in content.entries:
        found = _bare(content.entries[""], options, path)
    else:
        found = _by_name(content, path)
    if not found.theta:
        _place_stray(found, content, options, path)
    elif found.stray:
        raise _off_the_way(list(found.stray), path)
    _refuse_doubles(content, found, path)
    if options.key is None:
        _refuse_weighed(found, path)
    notices = list(_unread(found))
    strength, site = _strength(found, path)
    recognised = None if options.key else _recognise(found)
    beside = _weights(found)
    _say_what(recognised, notices)
    theta = {t: _theta(t, value, f"{path}, {found.keys[t]}") for t, value in found.theta.items()}
    return RawRotations(
        theta=theta,
        parametrization=recognised.parametrization if recognised else None,
        convention=recognised.convention if recognised else None,
        site=recognised.site if recognised else site,
        metadata={"recognised": recognised.by} if recognised else {},
        notices=tuple(notices),
        recognised=recognised.by if recognised else "",
        keys=found.names,
        dtype=_dtype(found.theta),
        strength=strength,
        weights={name: value for name, (_, value) in beside.items()},
        files={name: content.file_of.get(key, "") for name, (key, _) in beside.items()},
        settings=content.settings,
    )


def gate_keys(keys: tuple[str, ...]) -> tuple[str, ...]:
    """Which keys of a checkpoint are a gate's, on the way to the logits, by their names alone.

    A gate of a layer of the text; or, where a strength α lies beside it, one of no layer.
    """
    names = {key: name for key, name in unwrapped(keys).items() if not in_other_tower(name)}
    gates = [key for key, name in names.items() if is_certainly_a_gate(name)]
    layered = tuple(key for key in gates if layer_of(names[key]) is not None)
    alphas = [n for n in names.values() if "alpha" in n.lower() and layer_of(n) is None]
    return layered or (tuple(gates) if alphas else ())


def _by_name(content: Content, path: Path) -> _Found:
    names = unwrapped(content.entries.keys())
    found = _Found({}, {}, {}, {}, {})
    for key, value in content.entries.items():
        name = names[key]
        placed = layer_of(name)
        if placed is None:
            number = numbered(name)
            if number is not None and _is_blocks(value):
                _take(found, Target(number), key, name, value, path)
            elif _is_gate(name, value) or (_is_square(value) and looks_like_a_gate(name)):
                found.stray[key] = value
            else:
                found.beside[name] = (key, value)
            continue
        prefix, layer, rest = placed
        if not _is_gate(rest, value):
            found.beside[name] = (key, value)
            continue
        target = None if in_other_tower(prefix) else target_of(layer, rest)
        if target is None:
            raise RotationError(
                "a gate elsewhere than at the attention or a projection of a text layer: which "
                "matrix it could be folded into is not known",
                where=f"{path}, {key}",
                remedy="Where it does stand in front of one, name the gates that do: "
                "--key PATTERN, with {layer} for the number of the layer.",
            )
        _take(found, target, key, name, value, path)
    return found


def _by_key(content: Content, options: RotationOptions, path: Path) -> _Found:
    """The gates that ``--key`` names; what it does not name is no gate."""
    try:
        pattern = key_pattern(options.key or "")
    except re.error as error:
        raise ConfigError(f"{options.key!r} is no pattern: {error}", where="key") from None
    names = unwrapped(content.entries.keys())
    found = _Found({}, {}, {}, {}, {})
    for key, value in content.entries.items():
        match = pattern.fullmatch(key) or pattern.fullmatch(names[key])
        if match is None:
            found.beside[names[key]] = (key, value)
            continue
        number = next((group for group in match.groups() if (group or "").isdecimal()), None)
        if number is None:
            found.stray[key] = value
            continue
        placed = layer_of(names[key])
        target = (placed and target_of(placed[1], placed[2])) or Target(int(number))
        _take(found, target, key, names[key], value, path)
    if not found.theta and len(found.stray) == 1 and options.site is not Site.HEAD:
        ((key, value),) = found.stray.items()
        found.stray.clear()
        bare = _bare(value, options, path)
        found.theta, found.keys = bare.theta, dict.fromkeys(bare.theta, key)
        found.names = dict.fromkeys(bare.theta, names[key])
    if not found.theta and not found.stray:
        raise RotationError(
            f"no key is as --key {options.key} says ({gate_like(content.entries)})",
            where=str(path),
        )
    return found


def _bare(value: Any, options: RotationOptions, path: Path) -> _Found:
    """A tensor without a layer in its name: the gate of every layer that ``--layers`` names."""
    shape = list(getattr(value, "shape", ()))
    if options.layers is None:
        raise ConfigError(
            f"a tensor of shape {shape} that names no layer: which layers it belongs to is not "
            "known",
            where=str(path),
            remedy="Name them: --layers 0-11 (a tensor [N, 8, 8] is the gate of each of them, one "
            "of [layers, N, 8, 8] has a gate for each).",
        )
    layers = [layer for span in parse_layers(options.layers) for layer in span[: 1 << 16]]
    if getattr(value, "ndim", 0) == 4:
        if value.shape[0] != len(layers):
            raise RotationError(
                f"the tensor {shape} has gates for {value.shape[0]} layers, --layers names "
                f"{len(layers)}",
                where=str(path),
            )
        theta = {Target(layer): value[i] for i, layer in enumerate(layers)}
    else:
        theta = dict.fromkeys(map(Target, layers), value)
    return _Found(theta, dict.fromkeys(theta, "(no name)"), {}, {}, {})


def _place_stray(found: _Found, content: Content, options: RotationOptions, path: Path) -> None:
    """Of a file without gates in layers: its one rotation in front of the output head, or none.

    Raises:
        RotationError: there is no gate, or none on the way to the logits.
    """
    if not found.stray:
        raise RotationError(
            f"no rotation gates here ({gate_like(content.entries)})",
            where=str(path),
            remedy="If a tensor is one, name it: --key PATTERN, with {layer} for the number of "
            "the layer.",
        )
    rotation = next(iter(found.stray.values()))
    before_head = options.site is Site.HEAD or (_is_square(rotation) and len(_alphas(found)) == 1)
    if not before_head or len(found.stray) != 1:
        raise _off_the_way(list(found.stray), path)
    ((key, value),) = found.stray.items()
    found.stray.clear()
    found.theta[HEAD], found.keys[HEAD] = value, key
    found.names[HEAD] = unwrapped([key])[key]


def _off_the_way(keys: list[str], path: Path) -> RotationError:
    listed = ", ".join(keys[:_LISTED]) + (" …" if len(keys) > _LISTED else "")
    return RotationError(
        f"{listed}: a gate that belongs to no decoder layer. The gate of a safety or verifier "
        "head, of hidden states that are only returned, or one that no forward calls does not "
        "touch the logits, so there is nothing to bake",
        where=str(path),
        remedy="If it does stand between the last hidden state and the output head, say so: "
        "--site head. If other tensors are the gates, name them: --key PATTERN.",
    )


def _strength(found: _Found, path: Path) -> tuple[dict[Target, float], Site | None]:
    """s = σ(α) of a rotation in front of the head, and the site if it is one."""
    if HEAD not in found.theta:
        return {}, None
    alphas = _alphas(found)
    if len(alphas) > 1:
        raise RotationError(
            f"several strengths beside the rotation of the output head: {', '.join(alphas)}",
            where=str(path),
        )
    if not alphas:
        _refuse_other_strengths(found, path)
        return {}, Site.HEAD
    ((name, value),) = alphas.items()
    alpha = _number(value)
    if alpha is None or not math.isfinite(alpha):
        what = "no number" if alpha is None else str(alpha)
        raise RotationError(f"the strength is {what}", where=f"{path}, {found.beside[name][0]}")
    del found.beside[name]
    e = math.exp(-abs(alpha))
    return {HEAD: (1.0 if alpha >= 0 else e) / (1.0 + e)}, Site.HEAD


def _alphas(found: _Found) -> dict[str, object]:
    """What is called the strength of a rotation that belongs to no layer: tensor or number."""
    return {
        name: value
        for name, (_, value) in found.beside.items()
        if "alpha" in name.lower() and "lora" not in name.lower() and layer_of(name) is None
    }


def _number(value: object) -> float | None:
    """A Python number, or a real tensor of one element; None of anything else."""
    import torch

    if isinstance(value, torch.Tensor):
        real = value.numel() == 1 and not value.is_complex() and value.device.type == "cpu"
        return float(value) if real and value.dtype is not torch.bool else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _is_strength(name: str, value: object) -> bool:
    """Whether an entry is a number that may weigh what a gate computes."""
    leaf = name.rsplit(".", maxsplit=1)[-1].lower()
    return (
        any(word in leaf for word in _STRENGTHS)
        and "init" not in leaf
        and (_number(value) is not None)
    )


def _refuse_other_strengths(found: _Found, path: Path) -> None:
    """Refuse a number beside the head's rotation of which nobody knows how it weighs it."""
    for name, (key, value) in found.beside.items():
        if layer_of(name) is None and "lora" not in name and _is_strength(name, value):
            raise RotationError(
                "a number beside the rotation of the output head, and what it does to it is not "
                "known",
                where=f"{path}, {key}",
                remedy="Where the training computes lm_head(h + σ(α)·R·h), save α as alpha; where "
                "it computes lm_head(R·h), save the rotation alone.",
            )


def _take(found: _Found, target: Target, key: str, name: str, value: Any, path: Path) -> None:
    if target in found.theta:
        raise RotationError(
            f"two gates for {target}: {found.keys[target]} is another",
            where=f"{path}, {key}",
            remedy="Name the ones that were trained: --key PATTERN, with {layer} for the number "
            "of the layer.",
        )
    found.theta[target], found.keys[target], found.names[target] = value, key, name


def _is_gate(name: str, value: Any) -> bool:
    """Whether a tensor is the parameters of a gate: called theta, or blocks named as a gate's."""
    leaf = name.rsplit(".", maxsplit=1)[-1]
    if leaf == "theta":
        return looks_like_a_gate(name.removesuffix(".theta")) or getattr(value, "ndim", 3) == 3
    return looks_like_a_gate(name) and _is_blocks(value)


def _is_blocks(value: Any) -> bool:
    """Whether it is a float tensor [N, b, b]."""
    import torch

    return (
        isinstance(value, torch.Tensor)
        and value.ndim == 3
        and value.shape[1] == value.shape[2]
        and value.is_floating_point()
    )


def _is_square(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[0] == value.shape[1]


def _refuse_doubles(content: Content, found: _Found, path: Path) -> None:
    """Two values for one key: of a gate, or of a tensor beside the gates."""
    if content.twice:
        key = content.twice[0]
        target = next((t for t, k in found.keys.items() if k == key), None)
        what = f"two gates for {target}" if target else "two tensors of one name"
        raise RotationError(f"{what}, in different containers of the file", where=f"{path}, {key}")


def _refuse_weighed(found: _Found, path: Path) -> None:
    """Refuse a gate of a layer whose output a number beside its theta may weigh."""
    for name in _entries_of_gates(found):
        key, value = found.beside[name]
        if layer_of(name) is not None and _is_strength(name, value):
            raise RotationError(
                "a number beside a gate's parameters, which may weigh what the gate computes: "
                "what is folded is R alone",
                where=f"{path}, {key}",
                remedy="If the training's forward does not use it, name the parameters alone: "
                "--key PATTERN, with {layer} for the number of the layer.",
            )


def _entries_of_gates(found: _Found) -> list[str]:
    """Names of the other entries of gates."""
    parents = {name.rsplit(".", 1)[0] for name in found.names.values() if "." in name}
    return [
        name
        for name in found.beside
        if any(name.startswith(f"{parent}.") for parent in parents)
        and looks_like_a_gate(name)
        and not _is_weight(name)
    ]


def _unread(found: _Found) -> list[str]:
    """A notice about the other entries of gates, such as buffers; they leave what lies beside."""
    others = _entries_of_gates(found)
    keys = [found.beside.pop(name)[0] for name in others]
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return [f"Gate entries that are not read: {', '.join(keys[:_LISTED])}{more}."] if keys else []


def _is_weight(name: str) -> bool:
    """Whether a tensor is one of a projection's own, or of its LoRA branch."""
    return name.endswith((".weight", ".bias")) or ".lora_" in name


def _recognise(found: _Found) -> _Recognised | None:
    """What every gate's name and surroundings leave no choice about, the same for all."""
    kinds = {_kind(target, name, found) for target, name in found.names.items()}
    if len(kinds) != 1 or len(found.names) != len(found.theta):
        return None
    return kinds.pop()


def _kind(target: Target, name: str, found: _Found) -> _Recognised | None:
    placed = layer_of(name)
    if target.is_head or placed is None or placed[2].count(".") < 1:
        return None
    levels = name.split(".")
    gate = levels[-2]
    if "so8t_rotation_gate" in levels[1:-1]:  # perhaps with the name of PEFT's adapter below it
        above = levels[levels.index("so8t_rotation_gate") - 1]
        return _IN_PROJECTION if above.endswith("_proj") else None
    return _FAMILIES.get((gate, _wrapper(name, found)))


_INSIDE_A_MODULE = 2
"""Dots below the layer in the name of a gate that stands inside a module of the layer. Beside one
that stands in the layer itself are the layer's own modules, which wrap nothing."""


def _wrapper(name: str, found: _Found) -> str | None:
    """The only level beside a gate, if there is only one: what wraps the module it was put on."""
    placed = layer_of(name)
    if placed is None or placed[2].count(".") < _INSIDE_A_MODULE:
        return None
    parent = name.rsplit(".", 2)[0] + "."
    levels = {
        tuple(other[len(parent) :].split(".")) for other in found.beside if other.startswith(parent)
    }
    first = {parts[0] for parts in levels}
    return next(iter(first)) if len(first) == 1 and all(len(p) > 1 for p in levels) else None


def _weights(found: _Found) -> dict[str, tuple[str, torch.Tensor]]:
    """What lies beside the gates, with its key, by names without the levels around gates."""
    import torch

    levels: dict[tuple[str, str], str] = {}  # (above the layers, wrapped level in one) → without
    for name in found.names.values():
        placed = layer_of(name)
        if placed is not None and (wrapper := _wrapper(name, found)) is not None:
            inside = placed[2].rsplit(".", 2)[0]
            levels[placed[0], f"{inside}.{wrapper}."] = f"{inside}."
    weights: dict[str, tuple[str, torch.Tensor]] = {}
    for name, (key, value) in found.beside.items():
        if isinstance(value, torch.Tensor):
            weights[_without_wrapper(name, levels)] = (key, value)
    return weights


def _without_wrapper(name: str, levels: Mapping[tuple[str, str], str]) -> str:
    """A name without the level that wraps a module in layers with gates: those without a gate are
    wrapped as well."""
    placed = layer_of(name)
    if placed is None:
        return name
    prefix, _, rest = placed
    for (above, wrapped), plain in levels.items():
        if prefix == above and rest.startswith(wrapped):
            return name.removesuffix(rest) + plain + rest.removeprefix(wrapped)
    return name


def _say_what(recognised: _Recognised | None, notices: list[str]) -> None:
    if recognised is None:
        return
    facts = [f"convention {recognised.convention}", f"site {recognised.site}"]
    if recognised.parametrization:
        facts.insert(0, f"parametrization {recognised.parametrization}")
    notices.append(f"Recognised by the names {recognised.by}: {', '.join(facts)}.")


def _theta(target: Target, value: Any, where: str) -> FloatArray:
    if target.is_head and _is_square(value):
        return theta_array(value, where, ndim=2)[None]
    return theta_array(value, where)


def _dtype(theta: Mapping[Target, Any]) -> str:
    """The coarsest 16-bit dtype among the gates', "" if there is none."""
    names = {str(getattr(value, "dtype", "")).removeprefix("torch.") for value in theta.values()}
    return next((name for name in ("bfloat16", "float16") if name in names), "")
