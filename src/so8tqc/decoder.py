"""The decoder layers of a transformers model, and the projection after their attention.

Found by structure: no attribute's name is taken for granted, as architectures name theirs freely.
A model on the meta device does as well as a loaded one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from so8tqc.architectures import architecture, in_other_tower
from so8tqc.errors import RotationError

_PROJECTIONS = frozenset(
    {
        "o_proj",
        "out_proj",
        "dense",
        "c_proj",
        "wo",
        "o_b_proj",
        "attn_out",
        "to_out",
    }
)
"""What transformers calls the linear module that ends an attention."""

_RECURRENT = ("linear", "delta", "mamba", "lightning", "recurrent", "conv", "ssm", "cross")
"""Parts of the class names of token mixers that are no self-attention."""


def decoder_stack(module: Any) -> tuple[str, Any]:
    """Dotted name and ModuleList of the text model's decoder layers.

    It is the list with as many layers as the text configuration says, in the part of the model
    that has this configuration: image and audio towers have their own.

    Raises:
        RotationError: there is none, or more than one.
    """
    import torch

    config = module.config.get_text_config(decoder=True)
    count = getattr(config, "num_hidden_layers", None)
    lists = [
        (name, found)
        for name, found in module.named_modules()
        if isinstance(found, torch.nn.ModuleList)
        and len(found) == count
        and not in_other_tower(name + ".")
        and not _inside_a_list(name, module)
        and "cross" not in name  # layers that look at an image between those of the text
        and any(p.ndim > 1 for p in found[0].parameters())
    ]
    of_text = [pair for pair in lists if _config_above(module, pair[0]) is config] or lists
    with_attention = [
        pair
        for pair in of_text
        if any("attention" in type(m).__name__.lower() for m in pair[1].modules())
    ] or of_text
    if len(with_attention) != 1:
        names = ", ".join(name for name, _ in with_attention) or "none"
        raise RotationError(
            f"cannot tell the decoder layers of {type(module).__name__}: lists of {count} layers "
            f"in its text model: {names}",
            remedy="Only models with one stack of text layers can be judged.",
        )
    return with_attention[0]


def _inside_a_list(name: str, module: Any) -> bool:
    """Whether a module is part of a layer itself (experts, streams)."""
    import torch

    parts = name.split(".")
    above = (".".join(parts[:i]) for i in range(1, len(parts)))
    return any(isinstance(module.get_submodule(path), torch.nn.ModuleList) for path in above)


def text_part(module: Any, stack: str) -> str:
    """Dotted name of the outermost part of a model that is its text model alone; "" for the whole.

    What is outside of it joins pictures or sounds to the text, but for the output head.

    Args:
        module: a transformers model.
        stack: the list of its decoder layers, see :func:`decoder_stack`.
    """
    config = module.config.get_text_config(decoder=True)
    parts = stack.split(".")
    around = [".".join(parts[:i]) for i in range(len(parts))]
    own = (n for n in around if getattr(module.get_submodule(n), "config", None) is config)
    return next(own, "")


def _config_above(module: Any, name: str) -> Any:
    """The configuration of the nearest model around a module."""
    parts = name.split(".")
    for i in range(len(parts) - 1, -1, -1):
        config = getattr(module.get_submodule(".".join(parts[:i])), "config", None)
        if config is not None:
            return config
    return None


def attention_outputs(layer: Any) -> Iterator[str]:
    """Names below a decoder layer of the linear modules that end its self-attention."""
    for name, found in layer.named_modules():
        parent, _, leaf = name.rpartition(".")
        if leaf not in _PROJECTIONS or not _is_linear(found) or not parent:
            continue
        kind = type(layer.get_submodule(parent)).__name__.lower()
        if ("attention" in kind or "attn" in kind) and not any(word in kind for word in _RECURRENT):
            yield name


def _is_linear(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.ndim == 2 and not list(module.children())


def attention_output_of(module: Any) -> str:
    """The attention output projection, as a dotted name below the decoder layers that have one.

    What is known of the architecture, where a layer has it; else the one that the layers show.

    Raises:
        RotationError: layers name theirs in several ways.
    """
    config = module.config.get_text_config(decoder=True)
    name = architecture(config.model_type).attention_output
    try:
        _, layers = decoder_stack(module)
    except RotationError:
        return name
    if any(has_module(layer, name) for layer in layers):
        return name
    found = dict.fromkeys(n for layer in layers for n in attention_outputs(layer))
    if len(found) > 1:
        raise RotationError(
            f"{type(module).__name__} has several attention output projections: {', '.join(found)}",
            remedy="Name the modules in the keys of the gates: model.layers.N.MODULE.theta.",
        )
    return next(iter(found), name)


def has_module(layer: Any, name: str) -> bool:
    """Whether a layer has a module of this dotted name."""
    try:
        layer.get_submodule(name)
    except AttributeError:
        return False
    return True


def is_conv1d(module: Any) -> bool:
    """Whether a projection is transformers' Conv1D, which stores [in, out] and computes x·W + b."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def positions(module: Any) -> dict[int, list[str]]:
    """id of a parameter → all names it has: more than one where modules share it."""
    found: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return found
