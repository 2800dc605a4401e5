"""The two readings of a GGUF file: what its weights are worth, and what libllama makes of them.

*libllama* runs the file: activations are rounded to Q8_K or BF16, the cache to F16. *weights* are
its dequantized values in transformers' layout, run by transformers in float32, a layer at a time.
Between the two lies the runtime alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from so8tqc.checkpoints.safetensors_index import Checkpoint, open_checkpoint
from so8tqc.config import QCConfig
from so8tqc.disk.parts import bytes_of
from so8tqc.errors import ConfigError, InputError, MissingToolError, ModelError
from so8tqc.gguf.conversion import Conversion
from so8tqc.gguf.file import is_gguf, open_gguf
from so8tqc.llama.vendor import find_converter
from so8tqc.metrics.divergence import TokenTable
from so8tqc.record_kinds.qc import GGUFReading
from so8tqc.sources.compare import Pair
from so8tqc.sources.converted.history import traced
from so8tqc.sources.gguf_weights import GGUFWeights, require_architecture
from so8tqc.sources.layerwise.choice import ModelLoader
from so8tqc.sources.layerwise.free import free_memory
from so8tqc.sources.layerwise.gguf import GGUFFileWeights
from so8tqc.sources.layerwise.model import StreamedModel
from so8tqc.sources.layerwise.shell import UnstreamableError

_USED = 0.9
"""Share of the free memory that a file may take under libllama."""


class Reading(NamedTuple):
    """How a GGUF candidate is run.

    Attributes:
        by_libllama: whether libllama runs it.
        by_weights: the name under which its weights are run; None: they are not.
        directory: the model directory whose layout they are put into.
    """

    by_libllama: bool
    by_weights: str | None
    directory: Path


def readings_of(
    config: QCConfig, names: Mapping[str, Path], caches: Collection[str], loader: ModelLoader
) -> dict[str, Reading]:
    """GGUF candidate → how it is run.

    Args:
        config: of the ``qc``.
        names: candidates.
        caches: those that are a file with another cache: libllama's alone.
        loader: how models are loaded; told what is to be said.

    Raises:
        ConfigError: its weights are asked for where no model directory is given.
        MissingToolError: and there is no converter, which says how they are laid out.
        InputError: a file is larger than the free memory, and its weights cannot be run.
    """
    files = {name: path for name, path in names.items() if is_gguf(path)}
    if not files:
        return {}
    directory = config.base or config.reference
    able = directory.is_dir()
    asked = config.gguf_reading
    if asked in ("weights", "both"):
        if not able:
            raise ConfigError(
                "a GGUF file's weights are put into the layout of a model directory, and none is "
                "given",
                where="gguf_reading",
                remedy="Give the directory it was exported from as --reference (or --base).",
            )
        find_converter()
    elif able and asked is None:
        able = _has_converter(loader)
    return {
        name: Reading(True, None, directory)
        if name in caches
        else _reading(name, path, directory, config, loader, able=able)
        for name, path in files.items()
    }


def _reading(
    name: str, path: Path, directory: Path, config: QCConfig, loader: ModelLoader, *, able: bool
) -> Reading:
    own = f"{name} (weights)"
    match config.gguf_reading:
        case "libllama":
            return Reading(True, None, directory)
        case "weights":
            return Reading(False, name, directory)
        case "both":
            return Reading(True, own, directory)
    size, free = bytes_of(path), free_memory()
    if size > _USED * free:
        if not able:
            raise InputError(
                f"its {size / 1e9:.1f} GB do not fit into the free memory of {free / 1e9:.1f} GB",
                where=str(path),
                remedy="Give the model directory it was exported from as reference, and run "
                "so8tqc vendor: its weights are then run a layer at a time.",
            )
        loader.notices.append(
            f"{name} has {size / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free: it is judged "
            "by its weights, which transformers runs a layer at a time, not by libllama."
        )
        return Reading(False, name, directory)
    return Reading(True, own if loader.streams and able else None, directory)


class FileModels:
    """GGUF files by their weights, in a model directory's layout.

    Args:
        loader: runs them.
    """

    def __init__(self, loader: ModelLoader) -> None:
        self._loader = loader
        self._known: dict[Path, tuple[Checkpoint, Conversion]] = {}

    def load(self, path: Path, directory: Path) -> StreamedModel:
        """A file as a model of a directory's class (see ``sources.gguf_weights``).

        Raises:
            ModelError: they do not belong together, a weight cannot be put back, or the model
                cannot be run a layer at a time.
            MissingToolError: there is no converter.
        """
        if directory not in self._known:
            checkpoint = open_checkpoint(directory)
            self._known[directory] = checkpoint, traced(checkpoint)
        checkpoint, conversion = self._known[directory]
        file = open_gguf(path)
        require_architecture(file, conversion, directory)
        weights = GGUFFileWeights(GGUFWeights(file, checkpoint, conversion))
        try:
            return self._loader.of_weights(path, checkpoint, weights)
        except UnstreamableError as reason:
            raise ModelError(
                f"its weights cannot be run a layer at a time: {reason}",
                where=str(path),
                remedy="Use --gguf-reading libllama.",
            ) from None


def _has_converter(loader: ModelLoader) -> bool:
    try:
        find_converter()
    except MissingToolError:
        if loader.streams:
            loader.notices.append(
                "GGUF files are read by libllama alone: without llama.cpp's converter (so8tqc "
                "vendor) their weights cannot be put into transformers' layout."
            )
        return False
    return True


def reading_metrics(
    tables: Mapping[Pair, TokenTable], reference: str, name: str, by_weights: str
) -> GGUFReading:
    """What the readings of a file say.

    Args:
        tables: of the whole comparison.
        reference: the reference's name in it.
        name: the file's.
        by_weights: that of its weights; the same, if libllama did not run it.
    """

    def mean(pair: Pair) -> float:
        return float(tables[pair].columns["kl"].mean())

    weights = mean((reference, by_weights))
    if by_weights == name:
        return GGUFReading(weights=weights)
    between = mean((by_weights, name))
    return GGUFReading(weights=weights, libllama=mean((reference, name)), runtime=between)
