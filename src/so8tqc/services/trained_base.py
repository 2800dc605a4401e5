"""The base that rotations are applied to, whatever a training made of it.

Every command that takes a base and rotations asks here, so that all of them run, fold and judge
the same model: the base as it is; or, where the checkpoint of the gates is a whole model, has LoRA
branches or changed weights beside the gates, or turns a tied output head, the plain model that the
gates were trained on, written into a temporary directory (``checkpoints.restored``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from so8tqc.adapters.plan import AdapterPlan, plan_adapters
from so8tqc.adapters.trained import trained
from so8tqc.checkpoints.beside import Beside, beside_gates
from so8tqc.checkpoints.fitting import require_fitting_class
from so8tqc.checkpoints.patch import tensor_view
from so8tqc.checkpoints.plan import fitted
from so8tqc.checkpoints.quantized import require_unquantized
from so8tqc.checkpoints.restored import (
    Piece,
    base_pieces,
    in_float64,
    own_pieces,
    own_weights,
    restored_config,
    untied,
    unwrapped_model,
    without_tied_head,
    write_restored,
)
from so8tqc.checkpoints.safetensors_index import Checkpoint, open_checkpoint
from so8tqc.checkpoints.sites import locate_by_name
from so8tqc.disk.atomic import require_space, temporary_directory
from so8tqc.errors import ConfigError, InputError, RotationError
from so8tqc.gguf.file import is_gguf
from so8tqc.rotations.enums import Site
from so8tqc.rotations.files.content import weight_keys
from so8tqc.rotations.files.names import is_certainly_a_gate
from so8tqc.rotations.files.raw import RawRotations
from so8tqc.rotations.files.trained import gate_keys
from so8tqc.rotations.options import RotationOptions
from so8tqc.rotations.read import RotationSource, open_raw, source_of
from so8tqc.rotations.rotation_set import RotationSet
from so8tqc.threads import one_torch_thread


@dataclass(frozen=True)
class TrainedBase:
    """A base model and its rotations.

    Attributes:
        directory: a plain model directory, the base itself or what was restored.
        source: the rotations; None if there are none.
        rotations: the file or directory they were read from.
        kept: tensor → dtype to store it in, where the directory has it in float64 for the fold.
        notices: what was done to get there.
    """

    directory: Path
    source: RotationSource | None = None
    rotations: Path | None = None
    kept: Mapping[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    adapters: tuple[Path, ...] = ()
    """PEFT adapters beside the rotations, in the order in which they apply."""

    def adapter_plan(self, dtype: str = "keep") -> AdapterPlan | None:
        """What the adapters, and the gates in front, make of the base; None without adapters.

        Raises:
            InputError: they are malformed or do not fit the base.
        """
        if not self.adapters:
            return None
        checkpoint = open_checkpoint(self.directory)
        require_unquantized(checkpoint)
        rotations = self.rotation_set()
        with one_torch_thread():  # hundreds of small tensors: threads would wait for each other
            return plan_adapters(checkpoint, self.adapters, rotations, dtype=dtype, kept=self.kept)

    def rotation_set(self) -> RotationSet | None:
        """The rotations, shared blocks widened to the model; the notices are theirs, too.

        Raises:
            RotationError: they are none, or do not fit the model.
        """
        if self.source is None:
            return None
        return fitted(self.source.rotations(), open_checkpoint(self.directory))


def stray_gates(directory: Path) -> bool:
    """Whether a model directory's weights hold what is called a gate, wherever it may sit."""
    try:
        return any(map(is_certainly_a_gate, weight_keys(directory)))
    except RotationError:
        return False


def is_trained_directory(path: Path) -> bool:
    """Whether a model directory's own weights hold gates."""
    if not (path / "config.json").is_file():
        return False
    try:
        return bool(gate_keys(weight_keys(path)))
    except RotationError:  # what is wrong with its files is said when it is opened as a model
        return False


@contextmanager
def trained_base(
    base: Path, rotations: Path | None, options: RotationOptions, near: Path
) -> Iterator[TrainedBase]:
    """The plain model directory and rotations of a base and a rotation source.

    Args:
        base: a model directory, or one that is base and gates in one.
        rotations: the source; None: the base's own gates, or none.
        options: how it is read.
        near: a path beside which the restored model may lie for as long as it is used.

    Raises:
        InputError: either is unusable, or they do not fit each other; a GGUF file as base.
        ConfigError: rotations that leave facts open.
        ToolError: the disk has no room.
    """
    found = trained(rotations, options)
    if is_gguf(base):
        if rotations is not None or found.adapters:
            raise InputError(
                "rotations are applied to a model directory, not to a GGUF file", where=str(base)
            )
        yield TrainedBase(base)
        return
    if found.adapters:
        alone = options.model_copy(update={"adapters": ()})
        with trained_base(base, found.gates, alone, near) as made:
            yield dataclasses.replace(made, adapters=found.adapters)
        return
    same = rotations is not None and rotations.resolve() == base.resolve()
    named = rotations is None and (options.key is not None or options.site is Site.HEAD)
    own = same or named or is_trained_directory(base)
    if rotations is None and not own:
        yield TrainedBase(base)
        return
    source = rotations or base
    checkpoint = None if own else open_checkpoint(base)
    raw = open_raw(source, options)
    wanted = source_of(raw, source, options, None if own else base)
    if own and source.resolve() != base.resolve():
        raise ConfigError(
            "the base holds gates itself, and other rotations are given beside it",
            where=str(base),
            remedy="Give the base that the rotations belong to, or the trained directory alone.",
        )
    if checkpoint is None:
        beside = own_weights(raw, options.lora_alpha, str(base))
    else:
        beside = _beside(raw, source, checkpoint, options)
    head = wanted.site is Site.HEAD
    if checkpoint is not None and not beside.changes and not head:
        notices = (*wanted.notices, *beside.notices())
        yield TrainedBase(base, _with(wanted, notices), source, notices=tuple(beside.notices()))
        return
    with temporary_directory(near) as folder:
        out = folder / base.name
        out.mkdir()
        made = _restore(base, raw, beside, wanted, checkpoint, out)
        yield made


def _beside(raw: RawRotations, source: Path, base: Checkpoint, options: RotationOptions) -> Beside:
    """What lies beside the gates, held against the base."""
    if not raw.weights:
        return Beside()
    views = {name: tensor_view(entry) for name, entry in base.tensors.items()}
    return beside_gates(raw.weights, views, raw.settings, options.lora_alpha, str(source))


def _restore(
    base: Path,
    raw: RawRotations,
    beside: Beside,
    wanted: RotationSource,
    checkpoint: Checkpoint | None,
    out: Path,
) -> TrainedBase:
    """Write the plain model that the gates were trained on."""
    notices: list[str] = []
    if checkpoint is None:
        files = unwrapped_model(base, raw, beside)
        pieces = own_pieces(beside, files)
        config, changed = restored_config(base)
        without_tied_head(pieces, config)
        shapes = {name: tuple(piece.value.shape) for name, piece in pieces.items()}
        require_fitting_class(config, shapes, base)
        notices.append(
            f"{base.name} is base and gates in one: the base's own names were restored"
            + (f", its config too ({'; '.join(changed)})." if changed else ".")
        )
        notices += Beside(lora=beside.lora, unknown=beside.unknown).notices()
    else:
        files = {name: entry.file.name for name, entry in checkpoint.tensors.items()}
        pieces = base_pieces(checkpoint, beside)
        config = dict(checkpoint.config)
        notices += beside.notices()
    if wanted.site is Site.HEAD:
        config, said = untied(pieces, files, config, str(base))
        notices += [said] if said else []
    files = {name: files[name] for name in pieces}
    model_type = _model_type(config)
    folded = {site.weight for site in locate_by_name(tuple(wanted), pieces.keys(), model_type)}
    unrounded = in_float64(pieces, folded)
    kept = {n: pieces[n].dtype for n in pieces if unrounded[n].dtype != pieces[n].dtype}
    require_space(out.parent, _bytes(unrounded), "the model without its wrappers needs {}")
    write_restored(out, unrounded, files, config, base)
    said_all = (*wanted.notices, *notices)
    return TrainedBase(out, _with(wanted, said_all), Path(wanted.source), kept, tuple(notices))


def _with(source: RotationSource, notices: tuple[str, ...]) -> RotationSource:
    return dataclasses.replace(source, notices=notices)


def _bytes(pieces: Mapping[str, Piece]) -> int:
    return sum(
        8 * piece.value.numel() if piece.dtype == "F64" else piece.value.nbytes
        for piece in pieces.values()
    )


def _model_type(config: Mapping[str, object]) -> str:
    text = config.get("text_config")
    inner = text.get("model_type") if isinstance(text, dict) else None
    return str(inner or config.get("model_type", ""))
