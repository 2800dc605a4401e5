"""A transformers model without weights, into which a layer's are put and taken out again.

It is built as transformers builds it, its buffers computed, its parameters shapes without values
(accelerate's ``init_empty_weights``). Stored tensors become parameters by transformers' own loader,
a group at a time: whatever it renames, stacks or splits for an architecture, it does so here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from so8tqc.architectures import in_other_tower
from so8tqc.checkpoints.safetensors_index import Checkpoint
from so8tqc.checkpoints.skeleton import Skeleton, from_config, run_options
from so8tqc.decoder import decoder_stack, text_part
from so8tqc.errors import ModelError, RotationError, first_line
from so8tqc.sources.layerwise.weights import Weights
from so8tqc.sources.own_forward import attend_causally
from so8tqc.sources.quiet import quiet_transformers

AROUND, EMBEDDING, HEAD = "around", "embedding", "head"
"""Groups beside the layers: what stays, what only the first layer's input needs, the head."""

Group = str | int


class UnstreamableError(Exception):
    """A model that cannot be run a layer at a time, and why."""


class Shell:
    """A model whose weights come and go.

    Args:
        checkpoint: the model directory; its config and its tensors' names count here.
        dtype: compute dtype.
        attention: transformers' attention implementation, None for its default.
        changes: keys of the text configuration that are to have other values.

    Attributes:
        module: the transformers model, in eval mode.
        stack: dotted name of the list of decoder layers.
        layers: that list.
        groups: layer number, or name of a group → stored tensors in it.

    Raises:
        ModelError: transformers cannot build it.
        UnstreamableError: its layers cannot be told apart, or share weights.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: str = "float32",
        attention: str | None = None,
        changes: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        self.path: Path = checkpoint.directory
        self.dtype = dtype
        self.module = _built(checkpoint, dtype, attention, changes)
        self.head = self.module.get_output_embeddings()
        if self.head is None:
            raise ModelError("the model has no output head", where=str(self.path))
        try:
            self.stack, self.layers = decoder_stack(self.module)
        except RotationError as error:
            raise UnstreamableError(error.what) from None
        self._empty = dict(self.module.named_parameters(remove_duplicate=False))
        self._names = _shared_names(self._empty)
        self._require_own_weights()
        self.groups = self._grouped(checkpoint)

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return self.head.weight is self.module.get_input_embeddings().weight

    def load(self, group: Group, tensors: Mapping[str, Any]) -> None:
        """Put a group's stored tensors into the model, in the compute dtype.

        Raises:
            ModelError: a parameter gets no value, or one of another shape.
        """
        import torch
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        dtype = getattr(torch, self.dtype)
        load = LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=self.module._get_dtype_plan(dtype),
            weight_mapping=get_model_conversion_mapping(self.module),
        )
        with quiet_transformers(), torch.inference_mode(mode=False):
            info, _ = convert_and_load_state_dict_in_model(self.module, dict(tensors), load)
            self._tie(group)
        wrong = [f"{name} {tuple(a)} for {tuple(b)}" for name, a, b in info.mismatched_keys]
        wrong += [str(error) for error in info.conversion_errors.values()]
        if wrong:
            raise ModelError(f"a weight does not fit: {first_line(Exception(wrong[0]))}",
                             where=str(self.path))  # fmt: skip
        self._require_whole(group)

    def unload(self, group: Group) -> None:
        """Take a group's parameters out again."""
        for name in self.parameters(group):
            path, _, leaf = name.rpartition(".")
            self.module.get_submodule(path)._parameters[leaf] = self._empty[name]

    def parameters(self, group: Group) -> list[str]:
        """The parameters of a group, by all of their names."""
        return [name for name in self._empty if self._group_of(name) == group]

    def _tie(self, group: Group) -> None:
        """Shared parameters of a group are one again, wherever one of their names got a value."""
        for names in self._names:
            if self._group_of(names[0]) != group:
                continue
            held = [self.module.get_parameter(name) for name in names]
            given = [p for p in held if p.device.type != "meta"]
            for name in names if given else ():
                path, _, leaf = name.rpartition(".")
                self.module.get_submodule(path)._parameters[leaf] = given[0]

    def _require_whole(self, group: Group) -> None:
        missing = [
            name
            for name in self.parameters(group)
            if self.module.get_parameter(name).device.type == "meta" and self._is_of_text(name)
        ]
        if missing:
            raise ModelError(
                f"{len(missing)} weights are missing and would be random, first {missing[0]}",
                where=str(self.path),
            )

    def _is_of_text(self, parameter: str) -> bool:
        """Whether text goes through a parameter; a file of the text model alone lacks others."""
        part = text_part(self.module, self.stack)
        if not part or parameter.startswith(part + "."):
            return not in_other_tower(parameter)
        module = self.module.get_submodule(parameter.rpartition(".")[0])
        return module is self.head or module is self.module.get_input_embeddings()

    def _group_of(self, parameter: str) -> Group:
        """The group of a parameter."""
        if parameter.startswith(self.stack + "."):
            return int(parameter.removeprefix(self.stack + ".").split(".")[0])
        if in_other_tower(parameter):
            return "unused"
        path = parameter.rpartition(".")[0]
        module = self.module.get_submodule(path)
        if module is self.head and not self.tied:
            return HEAD
        alone = all(parameter not in names for names in self._names)
        if alone and "embed" in type(module).__name__.lower():
            return EMBEDDING
        return AROUND

    def _require_own_weights(self) -> None:
        for names in self._names:
            groups = {self._group_of(name) for name in names}
            if len(groups) > 1:
                raise UnstreamableError(f"{names[0]} is shared with {names[1]}, in another layer")

    def _grouped(self, checkpoint: Checkpoint) -> dict[Group, list[str]]:
        skeleton = Skeleton(self.module)
        known = set(self.module.state_dict())
        groups: dict[Group, list[str]] = {i: [] for i in range(len(self.layers))}
        groups |= {AROUND: [], EMBEDDING: [], HEAD: []}
        for name in checkpoint.tensors:
            parameter = skeleton.name_in_model(name)
            if parameter in known:
                groups.setdefault(self._group_of(parameter), []).append(name)
        if self.tied:  # a copy of the embedding is not loaded beside it
            own = {n for n in groups[AROUND] if self._is_head(skeleton.name_in_model(n))}
            if own != set(groups[AROUND]) and len(own) < 2:
                embedding = self._embedding_names(skeleton, groups[AROUND])
                groups[AROUND] = [n for n in groups[AROUND] if n not in own or not embedding]
        groups.pop("unused", None)
        return groups

    def _is_head(self, parameter: str) -> bool:
        return self.module.get_submodule(parameter.rpartition(".")[0]) is self.head

    def _embedding_names(self, skeleton: Skeleton, names: Iterable[str]) -> list[str]:
        embedding = self.module.get_input_embeddings()
        return [
            name
            for name in names
            if self.module.get_submodule(skeleton.name_in_model(name).rpartition(".")[0])
            is embedding
        ]


def wanted_tensors(shell: Shell, weights: Weights, group: Group) -> list[str]:
    """The stored tensors of a group, as far as the weights have them."""
    return [name for name in shell.groups.get(group, ()) if name in weights.names]


def _shared_names(parameters: Mapping[str, Any]) -> list[Sequence[str]]:
    found: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        found.setdefault(id(parameter), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def _built(
    checkpoint: Checkpoint, dtype: str, attention: str | None, changes: Mapping[str, object]
) -> Any:
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    options = run_options(dtype, attention)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(
                str(checkpoint.directory), local_files_only=True, trust_remote_code=False
            )
            for key, value in changes.items():
                setattr(config.get_text_config(decoder=True), key, value)
            with init_empty_weights(include_buffers=False):
                module = from_config(config, dtype=getattr(torch, dtype), **options)
            module.tie_weights()
            attend_causally(module)
    except Exception as error:  # noqa: BLE001  each architecture fails in its own way
        raise ModelError(
            f"transformers cannot build it: {first_line(error)}", where=str(checkpoint.directory)
        ) from None
    return module.eval()
