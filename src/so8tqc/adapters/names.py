"""Which stored tensors a module of the running model is: names differ, and so may the layout.

transformers renames while it loads: ``model.language_model.layers`` runs what files call
``language_model.model.layers`` or ``model.layers``, and joins the experts of a mixture into one 3D
parameter that files hold expert by expert. Names are compared without the words that say which
wrapper they are in; what then is not one tensor alone is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from so8tqc.architectures import ARCHITECTURES
from so8tqc.checkpoints.class_source import rules_out_conv1d
from so8tqc.checkpoints.safetensors_index import Checkpoint, TensorEntry
from so8tqc.checkpoints.skeleton import skeleton
from so8tqc.decoder import is_conv1d
from so8tqc.errors import RotationError, ShapeError

_WRAPPERS = frozenset({"model", "language_model", "transformer", "text_model", "base_model"})
_SAME = {"block_sparse_moe": "mlp"}
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_NUMBER = re.compile(r"\.\d+\.")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_HEADS = ("lm_head", "embed_out", "output")

EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
"""3D parameters of a mixture's experts, in the order in which modules define them."""

_EXPERT_SPELLINGS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


@dataclass(frozen=True)
class ExpertSlice:
    """A stored tensor that holds one expert's rows of a 3D parameter, or all of it.

    Attributes:
        entry: the tensor.
        expert: whose; None: all of them, [experts, out, in] or [experts, in, out].
        rows: of the expert's logical weight [out, in]; None: all.
        transposed: each expert is stored [in, out]; of whole tensors only square ones are asked,
            since the factors' shapes show it of others.
    """

    entry: TensorEntry
    expert: int | None
    rows: slice | None
    transposed: bool


class StoredNames:
    """The tensors of a checkpoint, found by the names of running modules."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._tensors: Mapping[str, TensorEntry] = checkpoint.tensors

    @cached_property
    def _canonical(self) -> dict[tuple[str, ...], list[str]]:
        found: dict[tuple[str, ...], list[str]] = {}
        for name in self._tensors:
            found.setdefault(_words(name), []).append(name)
        return found

    @cached_property
    def _by_parameter(self) -> dict[str, list[str]]:
        """What transformers itself calls each tensor in the model, of types that are not known."""
        if self._checkpoint.model_type in ARCHITECTURES:
            return {}
        built = skeleton(self._checkpoint)
        if built is None:
            return {}
        found: dict[str, list[str]] = {}
        for name in self._tensors:
            found.setdefault(built.name_in_model(name), []).append(name)
        return {name: names for name, names in found.items() if len(names) == 1}

    def find(self, name: str) -> TensorEntry | None:
        """The stored tensor that a running model calls ``name``, None if there is none.

        Raises:
            RotationError: several could be meant.
        """
        if name in self._tensors:
            return self._tensors[name]
        found = self._canonical.get(_words(name), []) or self._by_parameter.get(name, [])
        if len(found) > 1:
            raise RotationError(
                f"{name} may be any of {', '.join(found)}", where=str(self._checkpoint.directory)
            )
        return self._tensors[found[0]] if found else None

    def weight(self, module: str, source: str) -> TensorEntry:
        """The stored weight of a module.

        Raises:
            RotationError: there is none; why, where that is known.
        """
        entry = self.find(f"{module}.weight")
        if entry is not None:
            return entry
        if self.is_head(module) and self.ties_embeddings and (tied := self.embedding()):
            return tied
        raise RotationError(
            f"the adapter changes {module}, but the base has no tensor {module}.weight",
            where=source,
            remedy=self._why_missing(module),
        )

    def transposed(self, entry: TensorEntry) -> bool:
        """Whether a tensor is a Conv1D's, stored [in, out]: transformers' own module says so."""
        if _LAYER.search(entry.name) is None:
            return False
        known = ARCHITECTURES.get(self._checkpoint.model_type)
        if known is not None:
            return known.transposed
        if self._without_conv1d:
            return False
        built = skeleton(self._checkpoint)
        module = None if built is None else built.module_of(built.name_in_model(entry.name))
        return module is not None and is_conv1d(module)

    @cached_property
    def _without_conv1d(self) -> bool:
        return rules_out_conv1d(self._checkpoint)

    def _takes_rows(self, parameter: str) -> bool:
        """Whether experts multiply rows by a parameter, [in, out], as their module says.

        By that PEFT tells which of the two axes is which.
        """
        built = skeleton(self._checkpoint)
        module = None if built is None else built.module_of(parameter)
        return bool(getattr(module, "is_transposed", False))

    @cached_property
    def ties_embeddings(self) -> bool:
        """Whether head and embedding are one tensor (unless the file holds both)."""
        config = self._checkpoint.config
        text = config.get("text_config")
        inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
        default = self._stored_head is None
        value = config.get("tie_word_embeddings", inner)
        return bool(default if value is None else value) and self._stored_head is None

    def is_head(self, module: str) -> bool:
        """Whether a module is the output head."""
        return module.rsplit(".", 1)[-1] in _HEADS and _LAYER.search(module + ".") is None

    def is_head_bias(self, name: str) -> bool:
        """Whether a tensor is the output head's bias."""
        return name.endswith(".bias") and self.is_head(name.removesuffix(".bias"))

    def is_embedding(self, module: str) -> bool:
        """Whether a module is the token embedding."""
        return module.rsplit(".", 1)[-1] in _EMBEDDINGS and _LAYER.search(module + ".") is None

    def embedding(self) -> TensorEntry | None:
        """The token embedding."""
        for name, entry in self._tensors.items():
            if name.endswith(".weight") and self.is_embedding(name.removesuffix(".weight")):
                return entry
        return None

    @cached_property
    def _stored_head(self) -> TensorEntry | None:
        for name, entry in self._tensors.items():
            if name.endswith(".weight") and self.is_head(name.removesuffix(".weight")):
                return entry
        return None

    def _why_missing(self, module: str) -> str:
        pattern = re.compile(
            r"\.\d+\.".join(re.escape(p) for p in _NUMBER.split(f"{module}.weight"))
        )
        elsewhere = [n for n in self._tensors if pattern.search(".".join(("", n)))]
        if elsewhere and _LAYER.search(f"{module}."):
            return (
                f"It is there at other positions ({elsewhere[0]}): if this architecture shares one "
                "block among its layers, an adapter that trained each position apart has several "
                "changes for one stored weight, which no single weight can hold."
            )
        return (
            "The adapter belongs to another base model, or this architecture stores the weight "
            "under a name that is not known here."
        )

    def experts(self, container: str, parameter: str, source: str) -> list[ExpertSlice]:
        """The tensors that hold a 3D parameter of a mixture.

        Args:
            container: the module, e.g. ``model.layers.0.mlp.experts``.
            parameter: one of ``EXPERT_PARAMETERS``.
            source: for messages.

        Raises:
            RotationError: they are not there.
        """
        whole = self.find(f"{container}.{parameter}")
        if whole is not None:
            if len(whole.shape) != 3:
                raise ShapeError(f"{whole.name} has shape {list(whole.shape)}, expected 3 axes")
            square = whole.shape[1] == whole.shape[2]
            transposed = square and self._takes_rows(f"{container}.{parameter}")
            return [ExpertSlice(whole, None, None, transposed)]
        for spelling in _EXPERT_SPELLINGS.get(parameter, ()):
            slices: list[ExpertSlice] = []
            expert = 0
            while self.find(f"{container}.{expert}.{spelling[0]}.weight") is not None:
                start = 0
                for part in spelling:
                    entry = self.weight(f"{container}.{expert}.{part}", source)
                    slices.append(
                        ExpertSlice(entry, expert, slice(start, start + entry.shape[0]), False)
                    )
                    start += entry.shape[0]
                expert += 1
            if slices:
                return slices
        raise RotationError(
            f"the adapter changes {container}.{parameter}, which the base does not have",
            where=source,
            remedy="The adapter belongs to another base model.",
        )


def layer_of(name: str) -> int | None:
    """The layer that a name says, None if it says none."""
    match = _LAYER.search(name)
    return None if match is None else int(match[1])


def _words(name: str) -> tuple[str, ...]:
    return tuple(_SAME.get(w, w) for w in name.split(".") if w not in _WRAPPERS)
