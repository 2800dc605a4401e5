"""What lies beside the gates in a trained checkpoint, held against the base: nothing is ignored.

Each tensor is the base's own, or another value for one of the base's tensors, or half of a LoRA
branch, or something that the base has no place for. :func:`beside_gates` says which;
``checkpoints.restored`` folds what can be folded, and what cannot is refused here by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from so8tqc.checkpoints.sites import EMBEDDING_NAMES, HEAD_NAMES
from so8tqc.errors import ConfigError, RotationError, ShapeError
from so8tqc.rotations.files.pt import require_own_memory

if TYPE_CHECKING:
    import torch

_LORA = re.compile(r"^(?P<module>.+)\.lora_(?P<half>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")
_ANY_ADAPTER = re.compile(
    r"\.(?:lora_|oft_|ia3_|vera_|adalora|hada_|lokr_|base_layer\.|modules_to_save|magnitude)"
)
_BASE_LAYER = ".base_layer."
_SAVED = re.compile(r"\.modules_to_save\.[^.]+\.")
_BUFFERS = (".inv_freq", ".masked_bias", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
"""Computed from the config when a model is built; old checkpoints hold them."""

_NAMED = 5


class Lora(NamedTuple):
    """One LoRA branch, W + s·B·A: A [r, in], B [out, r]; and s, None where nothing states it."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float | None


@dataclass(frozen=True)
class Beside:
    """What lies beside the gates.

    Attributes:
        same: base tensors whose values the checkpoint repeats.
        coarser: of these, the ones it repeats rounded → the dtype they are rounded to.
        replaced: base tensor → the value that the checkpoint has instead.
        lora: base tensor → its LoRA branch.
        unknown: names that the base has no place for, outside of its layers.
    """

    same: tuple[str, ...] = ()
    coarser: Mapping[str, str] = field(default_factory=dict)
    replaced: Mapping[str, torch.Tensor] = field(default_factory=dict)
    lora: Mapping[str, Lora] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether the trained model differs from the base by more than its gates."""
        return bool(self.replaced or self.lora)

    def notices(self) -> list[str]:
        """What to tell of it, in sentences."""
        said = []
        if self.replaced:
            said.append(
                f"{len(self.replaced)} weights beside the gates differ from the base's and are "
                f"taken from the checkpoint: {listed(self.replaced)}."
            )
        if self.lora:
            scales = sorted({f"{branch.scale:g}" for branch in self.lora.values()})
            said.append(
                f"{len(self.lora)} LoRA branches are merged, W + s·B·A with s = "
                f"{', '.join(scales)}, before the gates are folded: {listed(self.lora)}."
            )
        if self.coarser:
            dtypes = ", ".join(sorted(set(self.coarser.values())))
            said.append(
                f"{len(self.coarser)} weights lie beside the gates in {dtypes}, the base's own "
                f"rounded to it; the base's are kept: {listed(self.coarser)}. If the training ran "
                "with the rounded ones, give the base in that dtype."
            )
        if self.unknown:
            said.append(
                f"{len(self.unknown)} tensors that the base model has no place for are not baked: "
                f"{listed(self.unknown)}."
            )
        return said


def beside_gates(
    weights: Mapping[str, torch.Tensor],
    base: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    lora_alpha: float | None,
    where: str,
) -> Beside:
    """Hold what lies beside the gates against the base's tensors.

    Args:
        weights: name without wrapper levels → tensor, of the checkpoint.
        base: name → tensor, of the base; views of its files, so that nothing is copied.
        settings: an adapter's configuration, or what of one the checkpoint itself holds.
        lora_alpha: α of the LoRA branches, where ``settings`` do not state it.
        where: the checkpoint, for messages.

    Raises:
        RotationError: a tensor that changes the model and cannot be folded, by name.
        ConfigError: LoRA branches whose scale nothing states.
        ShapeError: a tensor that does not fit its place in the base.
    """
    plain, lora = split_lora(weights, settings, lora_alpha, where)
    _refuse_own_head(plain, lora, base, where)
    same: list[str] = []
    replaced: dict[str, torch.Tensor] = {}
    unknown: list[str] = []
    coarser: dict[str, str] = {}
    for name, value in plain.items():
        place = place_of(name, base)
        if place is None:
            if name.endswith(_BUFFERS):
                continue
            if re.search(r"(?:^|\.)(?:layers|h|blocks)\.\d+\.", name) or _ANY_ADAPTER.search(name):
                raise RotationError(
                    "a weight beside the gates that the base model has no place for",
                    where=f"{where}, {name}",
                    remedy="What it does to the logits is not known. Name another base, or save "
                    "the model without it.",
                )
            unknown.append(name)
        elif equal(value, base[place], f"{where}, {name}"):
            same.append(place)
            if value.dtype.itemsize < base[place].dtype.itemsize:
                coarser[place] = str(value.dtype).removeprefix("torch.")
        else:
            replaced[place] = value
    placed: dict[str, Lora] = {}
    for name, branch in lora.items():
        place = place_of(name, base)
        if place is None:
            raise RotationError(
                "a LoRA branch of a weight that the base model does not have",
                where=f"{where}, {name}",
            )
        placed[place] = branch
    return Beside(tuple(same), coarser, replaced, placed, tuple(unknown))


def _refuse_own_head(
    plain: Mapping[str, torch.Tensor],
    lora: Collection[str],
    base: Collection[str],
    where: str,
) -> None:
    """Refuse a head that is no longer the embedding's matrix, where the base ties the two.

    Raises:
        RotationError: it is so.
    """
    import torch

    if any(name.endswith(HEAD_NAMES) for name in base):
        return
    embedding = next((v for name, v in plain.items() if name.endswith(EMBEDDING_NAMES)), None)
    own = [name for name in lora if name.endswith(HEAD_NAMES)]
    own += [
        name
        for name, value in plain.items()
        if name.endswith(HEAD_NAMES) and embedding is not None and not torch.equal(value, embedding)
    ]
    if own:
        raise RotationError(
            "the checkpoint's output head is not its embedding's matrix, and the base's is tied "
            "to it",
            where=f"{where}, {own[0]}",
            remedy="Give a base whose head has a matrix of its own (tie_word_embeddings: false), "
            "or save the trained model as a directory and bake that alone: so8tqc bake TRAINED "
            "--out DIR",
        )


def split_lora(
    weights: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    lora_alpha: float | None,
    where: str,
) -> tuple[dict[str, torch.Tensor], dict[str, Lora]]:
    """(name → weight, name of a weight → its LoRA branch) of what lies beside the gates.

    Raises:
        RotationError: an adapter's part that is no plain LoRA, by name.
        ConfigError: branches whose scale nothing states.
    """
    plain: dict[str, torch.Tensor] = {}
    halves: dict[str, dict[str, torch.Tensor]] = {}
    adapters: set[str] = set()
    for name, value in weights.items():
        match = _LORA.match(name)
        if match is not None and value.ndim == 2:
            require_own_memory(value, f"{where}, {name}")
            halves.setdefault(f"{match['module']}.weight", {})[match["half"]] = value
            adapters.add(match["adapter"] or "")
        elif ".original_module." not in name:
            plain[plain_name(name)] = value
    strange = [name for name in plain if _ANY_ADAPTER.search(name)]
    if strange or len(adapters) > 1:
        raise RotationError(
            f"beside the gates lie parts of an adapter that is no plain LoRA: {listed(strange)}"
            if strange
            else f"beside the gates lie several adapters: {', '.join(sorted(adapters))}",
            where=where,
            remedy="Save the model with one LoRA adapter, or without.",
        )
    if halves:
        _refuse_other_kinds(settings, where)
    return plain, {
        name: _branch(name, pair, settings, lora_alpha, where) for name, pair in halves.items()
    }


def plain_name(name: str) -> str:
    """A weight's name without the levels that PEFT puts around the modules it adapts."""
    return _SAVED.sub(".", name).replace(_BASE_LAYER, ".")


def place_of(name: str, base: Collection[str]) -> str | None:
    """The base's name of a tensor: its own, or with the leading ``model.`` that one of them has."""
    for candidate in (name, f"model.{name}", name.removeprefix("model.")):
        if candidate in base:
            return candidate
    if name.endswith(HEAD_NAMES):  # a tied head is saved again under its own name
        return next((other for other in base if other.endswith(EMBEDDING_NAMES)), None)
    return None


def equal(value: torch.Tensor, own: torch.Tensor, where: str) -> bool:
    """Whether a checkpoint's tensor is the base's, perhaps in the coarser dtype it was saved in.

    Raises:
        ShapeError: another shape.
        RotationError: integers or complex numbers where the base has real ones.
    """
    import torch

    require_own_memory(value, where)
    if value.shape != own.shape:
        raise ShapeError(
            f"the tensor has shape {list(value.shape)}, the base's has {list(own.shape)}",
            where=where,
            remedy="The checkpoint belongs to another base model.",
        )
    if own.is_floating_point() and not value.is_floating_point():
        raise RotationError(
            f"the tensor is {value.dtype}, the base's is {own.dtype}",
            where=where,
            remedy="Save the weights beside the gates as the floating-point numbers they stand "
            "for.",
        )
    return torch.equal(value, own.to(value.dtype))


def merged(weight: torch.Tensor, branch: Lora, *, transposed: bool) -> torch.Tensor:
    """W + s·B·A in float64, term by term in the order of r: no library's summation enters it.

    Args:
        weight: as stored, [out, in], or [in, out] if ``transposed``.
        branch: A [r, in], B [out, r], s.
        transposed: how the weight is stored.
    """
    left, right = branch.b.double() * float(branch.scale or 0.0), branch.a.double()
    if transposed:
        left, right = right.T.contiguous(), left.T.contiguous()
    total = weight.double()
    for k in range(right.shape[0]):
        total = total + left[:, k, None] * right[k]
    return total


def listed(names: Collection[str]) -> str:
    """The first few names, and how many more there are."""
    few = list(names)[:_NAMED]
    more = f" and {len(names) - len(few)} more" if len(names) > len(few) else ""
    return ", ".join(few) + more


def _branch(
    name: str,
    pair: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    alpha: float | None,
    where: str,
) -> Lora:
    if pair.keys() != {"A", "B"}:
        raise RotationError("half of a LoRA branch is missing", where=f"{where}, {name}")
    a, b = pair["A"], pair["B"]
    if a.shape[0] != b.shape[1]:
        raise ShapeError(
            f"the halves of a LoRA branch have shapes {list(a.shape)} and {list(b.shape)}",
            where=f"{where}, {name}",
        )
    rank = a.shape[0]
    stated = _pattern(settings.get("alpha_pattern"), name, settings.get("lora_alpha"))
    value = alpha if alpha is not None else stated
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ConfigError(
            "LoRA branches lie beside the gates, and nothing states their scale",
            where=f"{where}, {name}",
            remedy=f"State the α they were trained with: --lora-alpha (s = α/r, r = {rank} here; "
            "α/√r where the file says use_rslora).",
        )
    root = bool(settings.get("use_rslora"))
    return Lora(a, b, value / (math.sqrt(rank) if root else rank))


def _pattern(patterns: object, name: str, usual: object) -> object:
    """PEFT's rule: the first pattern that a module's name ends with, else the usual value.

    PEFT takes patterns for regular expressions; those of a file are compared as plain names here,
    and :func:`_refuse_other_kinds` refuses others.
    """
    if isinstance(patterns, Mapping):
        module = f".{name.removesuffix('.weight')}"
        for pattern, value in patterns.items():
            if module.endswith(f".{pattern}"):
                return value
    return usual


_PLAIN = {
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}
_FORBIDDEN = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "megatron_config",
    "monteclora_config",
    "velora_config",
    "kasa_config",
)


def _refuse_other_kinds(settings: Mapping[str, Any], where: str) -> None:
    """Refuse what would make a branch something else than s·B·A beside the stored base weight."""
    other = [key for key in _FORBIDDEN if settings.get(key)]
    for key in ("alpha_pattern", "rank_pattern"):
        names = settings.get(key) or {}
        if not isinstance(names, Mapping) or not all(re.fullmatch(r"[\w.]+", n) for n in names):
            other.append(key)
    other += [k for k, allowed in _PLAIN.items() if k in settings and settings[k] not in allowed]
    if other:
        raise RotationError(
            "the LoRA beside the gates has settings that change what it computes: "
            + ", ".join(f"{key}={settings[key]!r}" for key in other),
            where=where,
            remedy="Merge it into its base with the training's own code and save that, gates kept.",
        )
