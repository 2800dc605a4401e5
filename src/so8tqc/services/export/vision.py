"""The vision tower and its projector, in a file beside the text model's, and its proof.

The converter writes it in a run of its own (``--mmproj``), which is traced and replayed as that of
the text file is. The constants that pixels are normalised by lie in no tensor: they are compared
with the model directory's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from so8tqc.checkpoints.safetensors_index import Checkpoint
from so8tqc.errors import ToolError
from so8tqc.gguf.conversion import Conversion, read_conversion
from so8tqc.gguf.file import GGUFFile
from so8tqc.gguf.mmproj import Mmproj, open_mmproj, same_constants, text_width
from so8tqc.gguf.tensor_map import FloatArray
from so8tqc.llama.converter import convert
from so8tqc.llama.guarded_script import VISION
from so8tqc.llama.vendor import Converter
from so8tqc.progress import SILENT, Progress
from so8tqc.record_kinds.export import MmprojMetrics
from so8tqc.records import Check, judge, skipped
from so8tqc.services.export.comparison import TensorComparison
from so8tqc.services.export.proof import proof_checks
from so8tqc.services.export.traced import (
    BUFFERS,
    Replay,
    compare_stored,
    elements_reached,
)
from so8tqc.sources.converted.history import places_of

CHECK = "export.mmproj"
CONSTANTS = "export.mmproj_constants"
WIDTH = "export.mmproj_width"

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_UNSUPPORTED = ("is not supported", "Unsupported model type", "does not support")
"""What the converter says of a vision tower that it does not know."""

_TEXT_ONLY_ARGUMENTS = ("--no-mtp", "--no-nextn")


class NoVisionFileError(Exception):
    """Why a model that sees has no file of its vision tower."""


@dataclass(frozen=True)
class Vision:
    """A file of a vision tower that was written.

    Attributes:
        mmproj: the file.
        conversion: its history, None where the converter told none.
    """

    mmproj: Mmproj
    conversion: Conversion | None


def has_vision(checkpoint: Checkpoint) -> bool:
    """Whether a model directory is that of a model that takes pictures."""
    config = checkpoint.config
    return any(isinstance(config.get(key), dict) for key in ("vision_config", "vision_encoder"))


def write_vision(
    checkpoint: Checkpoint,
    converter: Converter,
    destination: Path,
    type_: str,
    arguments: tuple[str, ...],
    log: Path,
    progress: Progress = SILENT,
) -> Vision:
    """Write the vision tower and projector of a model directory.

    Args:
        checkpoint: the model directory.
        converter: which script.
        destination: file to write (not atomic: give a temporary path).
        type_: as the converter takes it.
        arguments: further ones for the converter.
        log: its whole output goes here.
        progress: told about tensors.

    Raises:
        NoVisionFileError: the directory lacks the processor's constants, or the converter does not
            know this vision tower.
        ToolError: the converter failed for another reason.
    """
    if constants_of(checkpoint.directory) is None:
        raise NoVisionFileError(
            f"neither {' nor '.join(_PROCESSORS)} says what pixels are normalised by (image_mean, "
            "image_std)"
        )
    with TemporaryDirectory(prefix="so8tqc-") as scratch:
        trace = Path(scratch) / "trace"
        given = [a for a in arguments if a not in _TEXT_ONLY_ARGUMENTS]
        try:
            convert(
                converter,
                checkpoint.directory,
                destination,
                type_,
                log,
                progress,
                trace=trace,
                arguments=[*given, VISION],
            )
        except ToolError as error:
            if any(words in error.what for words in _UNSUPPORTED):
                raise NoVisionFileError(f"{error.what}") from None
            raise
        conversion = read_conversion(trace, places_of(checkpoint))
    return Vision(open_mmproj(destination), conversion)


def constants_of(directory: Path) -> Mapping[str, tuple[float, ...]] | None:
    """``image_mean`` and ``image_std`` of a model directory's processor; None if it says none.

    Where both files say some, the later of the two counts, as in the converter and transformers.
    """
    found: dict[str, tuple[float, ...]] = {}
    for name in _PROCESSORS:
        content = _json(directory / name)
        inner = content.get("image_processor")
        for part in (content, inner if isinstance(inner, dict) else {}):
            for key in ("image_mean", "image_std"):
                value = part.get(key)
                if isinstance(value, list) and all(isinstance(v, int | float) for v in value):
                    found[key] = tuple(float(v) for v in value)
    return found if found.keys() == {"image_mean", "image_std"} else None


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def left_out(reason: str) -> Check:
    """``export.mmproj`` of a model without a file of its vision tower."""
    return skipped(CHECK, reason)


def not_written(reason: str) -> Check:
    """``export.mmproj`` where the converter failed."""
    return judge(CHECK, 0, 1, comparison=">=", detail=f"The vision tower: {reason}")


def vision_checks(
    checkpoint: Checkpoint,
    vision: Vision,
    text: GGUFFile,
    of_text: TensorComparison,
    progress: Progress = SILENT,
) -> list[Check]:
    """Every tensor against its source, nothing missing or extra; width and constants.

    Args:
        checkpoint: the model directory.
        vision: the file.
        text: the text model's file.
        of_text: what became of the tensors in that; what the vision file holds is taken out of its
            list of those that are in no file.
        progress: told about tensors.
    """
    name = vision.mmproj.gguf.path.name
    checks = [*constants_checks(checkpoint, vision.mmproj, name), _width(vision.mmproj, text, name)]
    if vision.conversion is None:
        return [*checks, skipped(CHECK, "The converter told no history of it.", subject=name)]
    found = compare_stored(checkpoint, vision.mmproj.gguf, vision.conversion, progress)
    found.different = [_told(name, checkpoint, vision) for name in found.different]
    _sort_towers(checkpoint, vision, found, of_text)
    proof = [check.model_copy(update={"subject": name}) for check in proof_checks(found)]
    return [*proof, *checks]


def _told(name: str, checkpoint: Checkpoint, vision: Vision) -> str:
    """A tensor that is not what its source gives, and what it is instead, where that is plain."""
    assert vision.conversion is not None  # the caller's condition
    tensor = vision.mmproj.gguf.tensors[name]
    values = Replay(vision.conversion, checkpoint).values(name)
    stored = tensor.values().reshape(tensor.shape)
    if values.ndim == 2 and values.T.shape == stored.shape and _same_values(values.T, stored):
        return f"{name} (stored transposed)"
    return name


def _same_values(a: FloatArray, b: FloatArray) -> bool:
    """Whether two arrays are the same but for what a type of 8 bits or more rounds away."""
    scale = float(np.abs(b).max())
    return bool(np.abs(a - b).max() <= scale / 127)


def _sort_towers(
    checkpoint: Checkpoint, vision: Vision, found: TensorComparison, of_text: TensorComparison
) -> None:
    """Share out the tensors that the text file lacks: in the vision file, or in none."""
    assert vision.conversion is not None  # the caller's condition
    reached = elements_reached(vision.mmproj.gguf, vision.conversion)
    looked_at = vision.conversion.looked_at
    for name in of_text.unmapped:
        size = prod(checkpoint.tensors[name].shape)
        if name in reached and reached[name] < size:
            found.missing.append(f"{name} (a part of it)")
        elif name.endswith(BUFFERS):
            found.equal[name] = "left out: stored elsewhere, or computed"
        elif name not in reached and name not in looked_at and is_of_vision(name):
            found.missing.append(name)
    of_text.unmapped = [
        name
        for name in of_text.unmapped
        if name not in reached and name not in found.missing and name not in found.equal
    ]


def is_of_vision(name: str) -> bool:
    """Whether a tensor's name says that it belongs to a vision tower or its projector."""
    return any(word in name for word in ("vision", "visual", "projector", "connector", "merger"))


def constants_checks(checkpoint: Checkpoint, mmproj: Mmproj, subject: str) -> list[Check]:
    """``export.mmproj_constants``: pixels are normalised as the model's own processor does."""
    wanted = constants_of(checkpoint.directory)
    if wanted is None:
        return [skipped(CONSTANTS, "The model directory says no constants.", subject=subject)]
    pairs = {"image_mean": mmproj.mean, "image_std": mmproj.std}
    other = [key for key, value in pairs.items() if not same_constants(value, wanted[key])]
    told = "; ".join(f"{key} {list(pairs[key])}, not {list(wanted[key])}" for key in other)
    if other and same_constants(mmproj.mean, wanted["image_std"]):
        told += ": mean and standard deviation are exchanged"
    elif other and all(
        same_constants(value[::-1], wanted[key]) for key, value in pairs.items() if key in other
    ):
        told += ": red and blue are exchanged"
    return [
        judge(
            CONSTANTS,
            len(other),
            0,
            subject=subject,
            detail=f"Constants that pixels are normalised by, unlike the processor's: "
            f"{told or 'none'}.",
        )
    ]


def _width(mmproj: Mmproj, text: GGUFFile, subject: str) -> Check:
    return judge(
        WIDTH,
        abs((mmproj.width or 0) - (text_width(text) or 0)),
        0,
        subject=subject,
        detail=f"The projector gives {mmproj.width} features, {text.path.name} takes "
        f"{text_width(text)}.",
    )


def mmproj_metrics(vision: Vision) -> MmprojMetrics:
    """What the record says of the file."""
    gguf = vision.mmproj.gguf
    return MmprojMetrics(
        projector=vision.mmproj.projector,
        file_type=gguf.file_type,
        types=gguf.types,
        tensors=len(gguf.tensors),
        bytes=gguf.path.stat().st_size,
    )
