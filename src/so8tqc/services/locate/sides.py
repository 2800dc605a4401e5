"""The models side by side: the reference, the candidate, and what rounding alone makes of it.

The *honest* side is the reference's weights, baked if it has gates or adapters, in exactly the
types that the candidate stores: what differs on it, types and arithmetic explain. A *variant* is
the reference with one key of its configuration as the candidate has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from so8tqc.checkpoints.plan import plan_bake
from so8tqc.checkpoints.plausible import require_plausible_config
from so8tqc.checkpoints.quantized import require_unquantized
from so8tqc.checkpoints.safetensors_index import (
    Checkpoint,
    load_any,
    open_checkpoint,
)
from so8tqc.checkpoints.skeleton import Skeleton
from so8tqc.decoder import decoder_stack
from so8tqc.errors import ModelError, RotationError
from so8tqc.gguf.file import is_gguf, open_gguf
from so8tqc.rotations.enums import Site
from so8tqc.rotations.rotation_set import RotationSet
from so8tqc.services.locate.config_keys import (
    FileKeys,
    change_words,
    changes_of_file,
    config_changes,
    config_of,
)
from so8tqc.services.locate.honest import (
    BIAS,
    Completed,
    HonestDirectory,
    HonestFile,
    zeros,
)
from so8tqc.services.tensors.expected import (
    KEEP,
    History,
    MakePatch,
    expected_of,
    patches_of,
)
from so8tqc.services.trained_base import TrainedBase
from so8tqc.sources.converted.history import traced
from so8tqc.sources.gated import gates_of, installed
from so8tqc.sources.gguf_weights import GGUFWeights, require_architecture
from so8tqc.sources.layerwise.doors import Doors, HasLayers
from so8tqc.sources.layerwise.gguf import GGUFFileWeights
from so8tqc.sources.layerwise.lanes import Gated, Lane, Plain
from so8tqc.sources.layerwise.shell import (
    Group,
    Shell,
    UnstreamableError,
    wanted_tensors,
)
from so8tqc.sources.layerwise.weights import CheckpointWeights, Weights
from so8tqc.sources.operations import Operations
from so8tqc.sources.unmerged import load_unmerged

if TYPE_CHECKING:
    pass


@dataclass
class Side:
    """A model whose layers come and go, its operations seen.

    Attributes:
        model: a shell, or a model in memory.
        weights: what its layers are read from; None: they are there.
        lane: what is changed of it at a layer.
        rotations: of a reference with gates.
    """

    model: HasLayers
    weights: Weights | None
    lane: Lane
    operations: Operations
    doors: Doors
    rotations: RotationSet | None = None

    def put(self, *groups: Group) -> None:
        """Have some groups' weights in the model."""
        import torch

        if isinstance(self.model, Shell) and self.weights is not None:
            for group in groups:
                names = wanted_tensors(self.model, self.weights, group)
                with torch.inference_mode(mode=False):  # they become parameters
                    read = self.weights.read(names)
                try:
                    self.model.load(group, read)
                except ModelError as error:
                    raise ModelError(error.what, where=self.weights.where) from None

    def take(self, group: Group) -> None:
        """Take a group's weights out again."""
        if isinstance(self.model, Shell):
            self.model.unload(group)

    @contextmanager
    def before_head(self) -> Iterator[None]:
        """Gates in front of the output head, for the duration of a ``with``."""
        if self.rotations is None or self.rotations.site is not Site.HEAD:
            yield
            return
        with installed(gates_of(self.model, self.rotations), Site.HEAD):
            yield


@dataclass
class _Resident:
    """A model in memory, as a shell shows itself."""

    module: Any
    layers: Any
    head: Any
    path: Path


class Variant(NamedTuple):
    """The reference with one of the candidate's keys.

    Attributes:
        words: what differs.
    """

    words: str
    side: Side


@dataclass(frozen=True)
class FileNames:
    """How a GGUF's tensors and a model's modules are called by one another.

    Attributes:
        module: weight of the file → the module that has it as its only stored tensor.
        type: module → the GGML type that its weight is stored in.
        columns: weight of the file → inputs of its product.
    """

    module: Mapping[str, str]
    type: Mapping[str, str]
    columns: Mapping[str, int]


@dataclass(frozen=True)
class Sides:
    """All models of a comparison.

    Attributes:
        variants: configuration key → the reference with the candidate's value of it.
        stack: dotted name of the list of decoder layers.
        types: stored types of the candidate.
        notices: what is to be said.
        unseen: what was not looked at, in sentences.
        file: of a GGUF candidate.
    """

    reference: Side
    candidate: Side
    honest: Side
    variants: Mapping[str, Variant]
    checkpoint: Checkpoint
    stack: str
    types: str
    notices: tuple[str, ...]
    unseen: tuple[str, ...]
    file: FileNames | None

    @property
    def all(self) -> list[Side]:
        """Every side."""
        return [
            self.reference, self.candidate, self.honest, *(v.side for v in self.variants.values()),
        ]  # fmt: skip


def open_sides(trained: TrainedBase, candidate: Path, dtype: str) -> Sides:
    """The models of a comparison.

    Args:
        trained: the reference.
        candidate: a model directory or a GGUF file.
        dtype: that all compute in.

    Raises:
        ModelError: one cannot be built or its layers cannot be told apart.
        MissingToolError: a GGUF is given and there is no converter.
        InputError: rotations or adapters do not fit.
    """
    checkpoint = open_checkpoint(trained.directory)
    require_unquantized(checkpoint)
    require_plausible_config(checkpoint)
    opened = (
        _opened_file(trained, checkpoint, candidate)
        if is_gguf(candidate)
        else _opened_directory(trained, checkpoint, candidate)
    )
    missing = Completed(opened.weights, checkpoint, zeros)
    lost = {name: checkpoint.tensors[name] for name in missing.lost}
    whole = replace(opened.checkpoint, tensors={**opened.checkpoint.tensors, **lost})
    shell = _shell(whole, dtype, opened.changes)
    own = Operations(shell.module, shell.stack)
    names = own.names
    made = Side(shell, missing, Plain(), own, Doors(shell))
    reference = _reference(trained, checkpoint, dtype, names)
    if len(reference.model.layers) != len(shell.layers):
        raise ModelError(
            f"it has {len(shell.layers)} layers, the reference {len(reference.model.layers)}",
            where=str(candidate),
            remedy="Give the candidate that was made from the reference.",
        )
    honest = _side(checkpoint, dtype, Completed(opened.honest, checkpoint, load_any), names)
    variants = {
        key: Variant(opened.words[key], side)
        for key, value in opened.differing.items()
        if (side := _variant(checkpoint, dtype, names, key, value)) is not None
    }
    unseen = list(opened.unseen)
    if not own.attends:
        unseen.append(
            f"the attention of {type(shell.module).__name__} is not one that can be watched from "
            "outside: rope, scores and soft cap are judged by its output projection's input"
        )
    notices = [*trained.notices]
    if missing.lost:
        count, first = len(missing.lost), missing.lost[0]
        notices.append(f"Biases that the candidate lacks run as zeros: {count}, first {first}.")
    return Sides(
        reference, made, honest, variants, checkpoint, shell.stack, opened.types,
        tuple(notices), tuple(unseen),
        None if opened.gguf is None else _file_names(opened.gguf, shell.module),
    )  # fmt: skip


class _Opened(NamedTuple):
    """A candidate.

    Attributes:
        checkpoint: the directory whose class runs it.
        changes: of that directory's configuration.
        differing: configuration keys in which it differs from the reference → its value.
        words: the same in words.
        honest: the reference's weights in its types.
    """

    checkpoint: Checkpoint
    weights: Weights
    changes: Mapping[str, Any]
    differing: Mapping[str, Any]
    words: Mapping[str, str]
    honest: Weights
    types: str
    unseen: tuple[str, ...]
    gguf: GGUFWeights | None = None


def _file_names(weights: GGUFWeights, module: Any) -> FileNames:
    skeleton = Skeleton(module)
    modules: dict[str, str] = {}
    types: dict[str, str] = {}
    for name, sources in weights.conversion.sources.items():
        if name not in weights.file.tensors or not sources:
            continue
        parameter = skeleton.name_in_model(sources[0])
        path = parameter.rpartition(".")[0]
        for same in () if name.endswith(BIAS) else skeleton.sharing(parameter):  # a tied head
            types[same.rpartition(".")[0]] = weights.file.tensors[name].type
        if len(sources) == 1:
            modules[name] = path
    columns = {name: tensor.shape[-1] for name, tensor in weights.file.tensors.items()}
    return FileNames(modules, types, columns)


def _opened_directory(trained: TrainedBase, checkpoint: Checkpoint, path: Path) -> _Opened:
    found = open_checkpoint(path)
    require_unquantized(found)
    require_plausible_config(found)
    ours, theirs = config_of(checkpoint.directory), config_of(path)
    differing = config_changes(ours, theirs)
    honest = HonestDirectory(checkpoint, _patches(trained, checkpoint), found)
    kinds = dict.fromkeys(entry.dtype for entry in found.tensors.values())
    return _Opened(
        found, CheckpointWeights(found), {}, differing,
        {key: change_words(key, ours, theirs) for key in differing},
        honest, ", ".join(kinds), (),
    )  # fmt: skip


def _opened_file(trained: TrainedBase, checkpoint: Checkpoint, path: Path) -> _Opened:
    file, conversion = open_gguf(path), traced(checkpoint)
    require_architecture(file, conversion, checkpoint.directory)
    keys = FileKeys({}, {}, ("the converter did not tell its keys",))
    if conversion.keys is not None:
        keys = changes_of_file(file, conversion.keys, config_of(checkpoint.directory))
    rotations, plan = trained.rotation_set(), trained.adapter_plan()
    planned = () if rotations is None or plan is not None else _planned(trained, checkpoint)
    expected = expected_of(
        checkpoint, file, rotations=rotations, planned=planned, plan=plan,
        history=History(conversion),
    )  # fmt: skip
    weights = GGUFWeights(file, checkpoint, conversion)
    return _Opened(
        checkpoint,
        GGUFFileWeights(weights),
        keys.changes, keys.changes, keys.words,
        GGUFFileWeights(HonestFile(file, expected)),
        ", ".join(file.types), keys.unknown, weights,
    )  # fmt: skip


def _planned(trained: TrainedBase, checkpoint: Checkpoint) -> Sequence[Any]:
    rotations = trained.rotation_set()
    assert rotations is not None
    return plan_bake(checkpoint, rotations, dtype=KEEP, all_layers=False, kept=trained.kept)


def _patches(trained: TrainedBase, checkpoint: Checkpoint) -> dict[str, MakePatch]:
    rotations, plan = trained.rotation_set(), trained.adapter_plan()
    planned = () if rotations is None or plan is not None else _planned(trained, checkpoint)
    return patches_of(rotations, planned, plan)


def _shell(checkpoint: Checkpoint, dtype: str, changes: Mapping[str, Any]) -> Shell:
    try:
        return Shell(checkpoint, dtype, changes=changes)
    except UnstreamableError as reason:
        raise ModelError(
            f"its operations cannot be told apart: {reason}", where=str(checkpoint.directory)
        ) from None


def _side(
    checkpoint: Checkpoint,
    dtype: str,
    weights: Weights,
    names: tuple[str, ...],
    changes: Mapping[str, Any] | None = None,
    lane: Lane | None = None,
) -> Side:
    shell = _shell(checkpoint, dtype, changes or {})
    operations = Operations(shell.module, shell.stack, _known(shell.module, names))
    return Side(shell, weights, lane or Plain(), operations, Doors(shell))


def _known(module: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    """The names that a model has, too."""
    parts = {name for name, _ in module.named_modules()}
    return tuple(name for name in names if name in parts)


def _variant(
    checkpoint: Checkpoint, dtype: str, names: tuple[str, ...], key: str, value: Any
) -> Side | None:
    """The reference with one other key; None if no such model can be built."""
    try:
        return _side(checkpoint, dtype, CheckpointWeights(checkpoint), names, {key: value})
    except ModelError:
        return None


def _reference(
    trained: TrainedBase, checkpoint: Checkpoint, dtype: str, names: tuple[str, ...]
) -> Side:
    """The model that was trained: the base, with gates by hooks, with adapters by PEFT."""
    rotations = trained.rotation_set()
    lane = Plain() if rotations is None else Gated(rotations)
    if not trained.adapters:
        side = _side(checkpoint, dtype, CheckpointWeights(checkpoint), names, lane=lane)
        return replace(side, rotations=rotations)
    module = load_unmerged(trained.directory, trained.adapters, dtype=dtype).module
    try:
        stack, layers = decoder_stack(module)
    except RotationError as error:
        raise ModelError(error.what, where=str(trained.directory)) from None
    whole = _Resident(module, layers, module.get_output_embeddings(), trained.directory)
    operations = Operations(module, stack, _known(module, names))
    return Side(whole, None, lane, operations, Doors(whole), rotations)
