"""Files of a vision tower and its projector: what they say, and which text file they belong to.

llama.cpp calls such a file ``mmproj``; its ``general.architecture`` is ``clip``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from so8tqc.errors import ModelError
from so8tqc.gguf.file import GGUFFile, open_gguf

ARCHITECTURE = "clip"
PREFIX = "mmproj-"
"""What llama.cpp's tools put in front of the text file's name, and look for beside it."""

_MEAN, _STD = "clip.vision.image_mean", "clip.vision.image_std"
_WIDTH = "clip.vision.projection_dim"


@dataclass(frozen=True)
class Mmproj:
    """What a file of a vision tower says of itself.

    Attributes:
        gguf: the file.
        projector: which of llama.cpp's projectors, e.g. ``qwen2vl_merger``; "" if it says none.
        width: features of the text model that it projects to; None if it does not say.
        mean, std: what pixels are normalised by, for each colour.
    """

    gguf: GGUFFile
    projector: str
    width: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


def mmproj_beside(text: Path) -> Path:
    """Where the vision tower of a text file is written."""
    return text.with_name(PREFIX + text.name)


def open_mmproj(path: Path) -> Mmproj:
    """Open a file of a vision tower.

    Raises:
        ModelError: missing, malformed, or the file of a text model.
    """
    from gguf import GGUFReader

    gguf = open_gguf(path)
    if gguf.architecture != ARCHITECTURE:
        raise ModelError(
            f"a {gguf.architecture or 'nameless'} model, where a file of a vision tower (mmproj) "
            "was expected",
            where=str(path),
            remedy="so8tqc export MODEL --out FILE.gguf writes it beside the text file.",
        )
    reader = GGUFReader(str(path), "r")  # which has the elements of arrays
    width = gguf.fields.get(_WIDTH)
    return Mmproj(
        gguf,
        str(gguf.fields.get("clip.projector_type", "")),
        width if isinstance(width, int) else None,
        _numbers(reader.fields, _MEAN),
        _numbers(reader.fields, _STD),
    )


def _numbers(fields: Mapping[str, Any], key: str) -> tuple[float, ...]:
    found = fields[key].contents() if key in fields else ()
    return tuple(float(value) for value in found)


def text_width(gguf: GGUFFile) -> int | None:
    """Features of a text file's embeddings; None if it does not say."""
    value = gguf.fields.get(f"{gguf.architecture}.embedding_length")
    return value if isinstance(value, int) else None


def require_same_width(mmproj: Mmproj, text: GGUFFile) -> None:
    """Refuse a vision tower that was made for a text model of another width.

    Raises:
        ModelError: the widths differ, or one of the files does not say its own.
    """
    width = text_width(text)
    if mmproj.width is None or mmproj.width != width:
        raise ModelError(
            f"this vision tower projects to {mmproj.width or 'an unstated number of'} features, "
            f"{text.path.name} has {width or 'an unstated number of'}",
            where=str(mmproj.gguf.path),
            remedy="Give the mmproj of this model: so8tqc export MODEL --out FILE.gguf writes it.",
        )


def same_constants(stored: Sequence[float], wanted: Sequence[float]) -> bool:
    """Whether a file holds these normalisation constants, as float32."""
    return np.array_equal(np.array(stored, np.float32), np.array(wanted, np.float32))
