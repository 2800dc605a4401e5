"""Where the rotated projections of each architecture are found in a checkpoint.

Which module ends a layer's attention, and how its weight is stored, ``architectures.ARCHITECTURES``
says of the types that it knows. Of others, and where a tensor is not found by that, transformers'
own model class is asked (``checkpoints.skeleton``), which takes seconds to import. Of a model that
transformers does not know either, what is usual is taken.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from so8tqc.architectures import ARCHITECTURES, architecture, in_other_tower
from so8tqc.checkpoints.safetensors_index import Checkpoint
from so8tqc.checkpoints.skeleton import Skeleton, skeleton
from so8tqc.decoder import is_conv1d
from so8tqc.errors import ModelError, RotationError
from so8tqc.rotations.rotation_set import Target

_LAYER = re.compile(r"^(?P<prefix>.*?)(?P<list>layers|h|blocks)\.(?P<layer>\d+)\.(?P<rest>.+)$")
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

Layers = Mapping[int, Mapping[str, str]]
"""Layer → {name below the layer: full tensor name}."""

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
        attention_output: the projection ends its layer's attention.
        sharing: layers whose projections are this one weight; empty where it is one layer's alone.
    """

    target: Target
    weight: str
    bias: str | None
    transposed: bool
    attention_output: bool = True
    sharing: tuple[int, ...] = ()


def text_layers(names: Collection[str], stack: str = "") -> Layers:
    """The layers of the text tower alone.

    Vision and audio towers also count their layers; their tensors are left out.

    Args:
        names: of a checkpoint's tensors.
        stack: dotted name of the text model's layers in the model, which tells several stacks
            apart that names do not.

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
    if len(towers) > 1 and stack:
        endings = [stack.split(".", i)[-1] for i in range(stack.count(".") + 1)]
        likely = next(
            (found for e in endings if len(found := [t for t in towers if _ends(t, e)]) == 1), []
        )
        if likely:
            return towers[likely[0]]
    if len(towers) > 1:
        raise ModelError(
            f"the checkpoint has several stacks of layers: {', '.join(sorted(towers))}",
            remedy="Only models with one text tower can be baked.",
        )
    return next(iter(towers.values()))


def _ends(tower: str, ending: str) -> bool:
    return tower == ending or tower.endswith("." + ending)


def layers_stored(names: Collection[str]) -> int:
    """How many layers the largest stack of a checkpoint has, whichever the text's is."""
    indices: dict[str, set[int]] = {}
    for name in names:
        if match := _LAYER.match(name):
            indices.setdefault(match["prefix"] + match["list"], set()).add(int(match["layer"]))
    return max(map(len, indices.values()), default=0)


def layers_of_text(checkpoint: Checkpoint) -> Layers:
    """The decoder layers of a checkpoint, without those that only predict further tokens (MTP).

    Raises:
        ModelError: no decoder layers, or several stacks of which none is known to be the text's.
    """
    names = checkpoint.tensors.keys()
    try:
        layers = text_layers(names)
    except ModelError:
        built = skeleton(checkpoint)
        if built is None:
            raise
        layers = text_layers(names, built.stack)
    count = text_layer_count(checkpoint)
    return {i: found for i, found in layers.items() if count is None or i < count}


def text_layer_count(checkpoint: Checkpoint) -> int | None:
    """How many decoder layers the config says; None if it does not."""
    text = checkpoint.config.get("text_config")
    config = text if isinstance(text, dict) else checkpoint.config
    return next((c for k in _COUNTS if isinstance(c := config.get(k), int)), None)


def locate(targets: Collection[Target], checkpoint: Checkpoint) -> tuple[TensorSite, ...]:
    """Find the stored tensors of every target, in the order given.

    Raises:
        RotationError: a gate for a layer or projection that does not exist.
        ModelError: no text tower, or several.
    """
    if checkpoint.model_type in ARCHITECTURES:
        try:
            return _located(targets, checkpoint, None)
        except RotationError:
            pass  # the class can say more of what is missing
    return _located(targets, checkpoint, skeleton(checkpoint))


def _located(
    targets: Collection[Target], checkpoint: Checkpoint, built: Skeleton | None
) -> tuple[TensorSite, ...]:
    layers = layers_of_text(checkpoint)
    names = checkpoint.tensors.keys()
    return tuple(
        _head(target, names)
        if target.is_head
        else _site(target, layers, names, checkpoint.model_type, built)
        for target in targets
    )


def locate_by_name(
    targets: Collection[Target], names: Collection[str], model_type: str
) -> tuple[TensorSite, ...]:
    """As :func:`locate`, of tensors that are in no checkpoint yet: by their names alone.

    Raises:
        RotationError, ModelError: as :func:`locate`.
    """
    layers = text_layers(names)
    return tuple(
        _head(target, names) if target.is_head else _site(target, layers, names, model_type, None)
        for target in targets
    )


def _site(
    target: Target,
    layers: Layers,
    names: Collection[str],
    model_type: str,
    built: Skeleton | None,
) -> TensorSite:
    if target.layer not in layers:
        raise RotationError(
            f"there is a gate for layer {target.layer}, the model has layers "
            f"{min(layers)} to {max(layers)}",
            remedy="The rotations belong to another model, or --layers is needed.",
        )
    known = architecture(model_type)
    output = known.attention_output if built is None else built.attention_output
    module = target.module or output
    below = layers[target.layer]
    sharing = _sharing(target.layer, module, built)
    weight = below.get(f"{module}.weight")
    if weight is None and built is not None:
        weight = _stored(target.layer, f"{module}.weight", layers, sharing, built)
    if weight is None:
        raise RotationError(
            f"layer {target.layer} has no tensor {module}.weight",
            remedy=f"Model type {model_type!r} keeps it elsewhere, or fuses it with "
            "others (fused projections cannot be rotated on their own), or the layer has no "
            "attention." + _instead(target.layer, built),
        )
    bias = weight.removesuffix("weight") + "bias"
    return TensorSite(
        target=target,
        weight=weight,
        bias=bias if bias in names else None,
        transposed=_transposed(weight, known.transposed, built),
        attention_output=module == output or weight == below.get(f"{output}.weight"),
        sharing=sharing,
    )


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


def _instead(layer: int, built: Skeleton | None) -> str:
    """What the layer has in place of a projection that it does not have, as a sentence."""
    from so8tqc.decoder import attention_outputs

    if built is None or not built.stack:
        return ""
    found = list(attention_outputs(built.model.get_submodule(built.stack)[layer]))
    if not found:
        return f" In {type(built.model).__name__}, layer {layer} has no self-attention."
    return f" {type(built.model).__name__} ends its attention with {', '.join(found)}."


def _sharing(layer: int, module: str, built: Skeleton | None) -> tuple[int, ...]:
    """Layers whose modules of this name are one and the same; empty if only this layer's is."""
    if built is None or not built.stack:
        return ()
    start = f"{built.stack}."
    names = built.sharing(f"{start}{layer}.{module}.weight")
    if len(names) == 1:
        return ()
    inside = [name.removeprefix(start).split(".")[0] for name in names if name.startswith(start)]
    return tuple(sorted({int(i) for i in inside}))


def _stored(
    layer: int, leaf: str, layers: Layers, sharing: tuple[int, ...], built: Skeleton
) -> str | None:
    """The stored tensor that transformers loads into a layer's parameter, whatever it is called."""
    for index in (layer, *sharing):
        wanted = f"{built.stack}.{index}.{leaf}"
        for name in layers.get(index, {}).values():
            if built.name_in_model(name) == wanted:
                return name
    return None


def _transposed(weight: str, known: bool, built: Skeleton | None) -> bool:
    """Whether a weight is stored [in, out]: transformers' own module says so."""
    module = None if built is None else built.module_of(built.name_in_model(weight))
    return known if module is None else is_conv1d(module)


def layers_with_attention(checkpoint: Checkpoint) -> frozenset[int]:
    """Decoder layers that have an attention output projection: those that want a gate.

    Empty for a model without attention. Every layer of the types in ``ARCHITECTURES`` has it. Of a
    model that transformers does not know, those that store the usual projection; all of them where
    none does.
    """
    layers = layers_of_text(checkpoint)
    if checkpoint.model_type in ARCHITECTURES:
        return frozenset(layers)
    built = skeleton(checkpoint)
    if built is not None and built.stack:
        return built.attention_layers.intersection(layers)
    name = f"{architecture(checkpoint.model_type).attention_output}.weight"
    return frozenset(i for i in layers if name in layers[i]) or frozenset(layers)


def require_all_layers(present: Collection[int], checkpoint: Checkpoint) -> None:
    """Every decoder layer that has attention must have a gate.

    Raises:
        RotationError: naming the layers without one.
    """
    if missing := sorted(layers_with_attention(checkpoint) - set(present)):
        raise RotationError(
            f"no gate for layer(s) {', '.join(map(str, missing))}",
            remedy="Give --layers to bake only the layers that have one.",
        )
