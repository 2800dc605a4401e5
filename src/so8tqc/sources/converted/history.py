"""The converter, run until it understands a model directory; what it does to every tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from so8tqc.checkpoints.safetensors_index import Checkpoint
from so8tqc.errors import ToolError
from so8tqc.gguf.conversion import Conversion, read_conversion
from so8tqc.llama.config_keys import causal_class_of, derived, given, missing_keys
from so8tqc.llama.converter import in_plain_words, trace_conversion
from so8tqc.llama.vendor import Converter, find_converter
from so8tqc.sources.converted.unasked_keys import unasked

NO_MTP = "--no-mtp"
_ARCHITECTURES = "architectures"
"""Published models that see often name their text model's class here; a saved copy may not."""


@dataclass(frozen=True)
class Told:
    """What the converter is told beside the model directory.

    Attributes:
        keys: of the configuration.
        arguments: of its command line.
    """

    keys: dict[str, Any]
    arguments: list[str]


def until_understood(
    attempt: Callable[[Told], None], checkpoint: Checkpoint, arguments: Sequence[str] = ()
) -> Told:
    """Run the converter; what it misses and the model says is given to it, and it tries again.

    Args:
        attempt: runs it once.
        checkpoint: the model directory.
        arguments: for its command line, from the start.

    Returns:
        What it was told in the end.

    Raises:
        ToolError: it failed for another reason.
    """
    told = Told(unasked(checkpoint), list(arguments))
    while True:
        try:
            attempt(told)
        except ToolError as error:
            if not _met_halfway(error, checkpoint, told):
                raise in_plain_words(error) from None
        else:
            return told


def _met_halfway(error: ToolError, checkpoint: Checkpoint, told: Told) -> bool:
    """Give the converter what it missed, where the model says it; whether another try is due."""
    text = checkpoint.config.get("text_config")
    known = text if isinstance(text, dict) else checkpoint.config
    keys = told.keys
    for key in missing_keys(error.what):
        value = derived(key, known, checkpoint.directory, checkpoint.shapes)
        if value is not None and (new := given(key, value, known)).keys() - keys.keys():
            keys |= new
            return True
    unknown = "is not supported" in error.what and _ARCHITECTURES not in keys
    if unknown and known is text and (class_name := causal_class_of(known)) is not None:
        keys[_ARCHITECTURES] = [class_name]
        return True
    if "AssertionError" in error.what and NO_MTP not in told.arguments:
        told.arguments.append(NO_MTP)  # for layers of further tokens, which a re-saved model lacks
        return True
    return False


def traced(checkpoint: Checkpoint) -> Conversion:
    """What the converter does to every tensor of a model directory; it writes no GGUF.

    It starts for seconds, so that a process asks it once as long as no file of the directory has
    changed.

    Raises:
        MissingToolError: there is no converter (``so8tqc vendor``).
        ToolError: it failed, or left no trace.
    """
    converter = find_converter()
    told = (converter.script, *_state(checkpoint.directory))
    if told not in _TRACED:
        _TRACED[told] = _trace(checkpoint, converter)
        while len(_TRACED) > _MOST_TRACED:
            _TRACED.pop(next(iter(_TRACED)))
    return _TRACED[told]


_MOST_TRACED = 4
_TRACED: dict[tuple[object, ...], Conversion] = {}


def _state(directory: Path) -> Iterator[tuple[object, ...]]:
    """What the system says of the files of a directory, and of itself."""
    yield (directory.absolute(),)
    for path in sorted(directory.rglob("*")):
        if not path.exists():  # a link to nothing
            continue
        told = path.stat()
        yield path, told.st_ino, told.st_size, told.st_mtime_ns, told.st_ctime_ns


def _trace(checkpoint: Checkpoint, converter: Converter) -> Conversion:
    with TemporaryDirectory(prefix="so8tqc-") as scratch:
        trace = Path(scratch) / "trace.json"
        until_understood(
            lambda told: trace_conversion(
                converter, checkpoint.directory, trace, told.keys, told.arguments
            ),
            checkpoint,
        )
        found = read_conversion(trace, places_of(checkpoint))
    if found is None:
        raise ToolError("the converter left no trace", where=str(checkpoint.directory))
    return found


def places_of(checkpoint: Checkpoint) -> dict[tuple[str, int], str]:
    """(file name, byte offset) → the tensor stored there."""
    return {(e.file.name, e.start): name for name, e in checkpoint.tensors.items()}
