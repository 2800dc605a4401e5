"""Where the rotated projections of each architecture are found in a checkpoint.

A newcomer's architecture is one line in ``architectures.ARCHITECTURES`` if its attention output
projection is not called ``self_attn.o_proj``.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from so8tqc.architectures import architecture
from so8tqc.errors import ModelError, RotationError
from so8tqc.rotations.rotation_set import Target
from so8tqc.rotations.towers import in_other_tower

_LAYER = re.compile(r"^(?P<prefix>.*?)(?P<list>layers|h|blocks)\.(?P<layer>\d+)\.(?P<rest>.+)$")

HEAD_NAMES = ("lm_head.weight", "embed_out.weight")
"""How the output head's matrix is called."""

EMBEDDING_NAMES = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
"""How the matrix is called that a tied head shares."""


@dataclass(frozen=True)
class TensorSite:
    """The stored tensors of one target.

    Attributes:
        target: which rotation belongs here.
        weight: name of the weight tensor.
        bias: name of the bias tensor, None if the projection has none.
        transposed: the weight is stored [in, out].
    """

    target: Target
    weight: str
    bias: str | None
    transposed: bool


def text_layers(names: Collection[str]) -> dict[int, dict[str, str]]:
    """layer → {name below the layer: full tensor name}, of the text tower alone.

    Vision and audio towers also count their layers; their tensors are left out.

    Raises:
        ModelError: no decoder layers, or more than one text tower.
    """
    towers: dict[str, dict[int, dict[str, str]]] = {}
    for name in names:
        match = _LAYER.match(name)
        if match is None or in_other_tower(match["prefix"]):
            continue
        tower = towers.setdefault(match["prefix"] + match["list"], {})
        tower.setdefault(int(match["layer"]), {})[match["rest"]] = name
    if not towers:
        raise ModelError("the checkpoint has no decoder layers that this tool knows")
    if len(towers) > 1:
        raise ModelError(
            f"the checkpoint has several stacks of layers: {', '.join(sorted(towers))}",
            remedy="Only models with one text tower can be baked.",
        )
    return next(iter(towers.values()))


def locate(
    targets: Collection[Target], names: Collection[str], model_type: str
) -> tuple[TensorSite, ...]:
    """Find the stored tensors of every target, in the order given.

    Raises:
        RotationError: a gate for a layer or projection that does not exist.
    """
    layers = text_layers(names)
    sites = []
    for target in targets:
        if target.is_head:
            sites.append(_head(target, names))
            continue
        if target.layer not in layers:
            raise RotationError(
                f"there is a gate for layer {target.layer}, the model has layers "
                f"{min(layers)} to {max(layers)}",
                remedy="The rotations belong to another model, or --layers is needed.",
            )
        module = target.module or architecture(model_type).attention_output
        weight = layers[target.layer].get(f"{module}.weight")
        if weight is None:
            raise RotationError(
                f"layer {target.layer} has no tensor {module}.weight",
                remedy=f"Model type {model_type!r} keeps it elsewhere, or fuses it with others; "
                "fused projections cannot be rotated on their own.",
            )
        sites.append(
            TensorSite(
                target=target,
                weight=weight,
                bias=layers[target.layer].get(f"{module}.bias"),
                transposed=architecture(model_type).transposed,
            )
        )
    return tuple(sites)


def _head(target: Target, names: Collection[str]) -> TensorSite:
    """The output head's own matrix.

    Raises:
        RotationError: it has none.
    """
    weight = next((name for name in names if name.endswith(HEAD_NAMES)), None)
    if weight is None:
        raise RotationError(
            "the output head has no matrix of its own in these files",
            remedy="A head that is tied to the embedding is untied by so8tqc bake.",
        )
    bias = weight.removesuffix("weight") + "bias"
    return TensorSite(target, weight, bias if bias in names else None, transposed=False)


def require_all_layers(present: Collection[int], names: Collection[str]) -> None:
    """Every decoder layer must have a gate.

    Raises:
        RotationError: naming the layers without one.
    """
    missing = sorted(set(text_layers(names)) - set(present))
    if missing:
        raise RotationError(
            f"no gate for layer(s) {', '.join(map(str, missing))}",
            remedy="Give --layers to bake only the layers that have one.",
        )
