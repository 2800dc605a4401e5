"""What models must share before they are compared: the architecture, and what each token is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from so8tqc.architectures import architecture
from so8tqc.errors import ModelError
from so8tqc.gguf.file import is_gguf, open_gguf


def require_same_architecture(reference: Path, candidates: Iterable[Path]) -> None:
    """Refuse a candidate of another architecture, whose every number would be meaningless.

    A GGUF file is compared with a model directory where it is known what the converter makes of it.

    Args:
        reference: a model directory or a GGUF file.
        candidates: likewise.

    Raises:
        ModelError: one is of another architecture.
    """
    expected = _architecture(reference)
    for path in candidates:
        found = _architecture(path)
        if is_gguf(path) != is_gguf(reference):
            directory, file = (expected, found) if is_gguf(path) else (found, expected)
            same = architecture(directory).gguf in (None, file)
        else:
            same = found == expected
        if found and expected and not same:
            raise ModelError(
                f"a {found} model, where the reference is a {expected}: they cannot be compared",
                where=str(path),
                remedy="Give the candidate that was made from the reference.",
            )


def _architecture(path: Path) -> str:
    """``general.architecture`` or ``model_type``; "" where there is none to read."""
    if is_gguf(path):
        return open_gguf(path).architecture
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # said when the model is opened
        return ""
    kind = config.get("model_type", "") if isinstance(config, dict) else ""
    return kind if isinstance(kind, str) else ""


def ids_of(pieces: Sequence[str | None]) -> dict[str, int]:
    """Token → id, of the ordinary tokens that have one id alone."""
    times = Counter(pieces)
    return {piece: i for i, piece in enumerate(pieces) if piece is not None and times[piece] == 1}


def require_same_tokens(
    path: Path, pieces: Sequence[str | None], known: Mapping[str, int], whose: str
) -> None:
    """Refuse a file that has another id for a token: texts would say something else to it.

    Pieces that ``known`` does not have are passed over, as a converter writes some differently, and
    those that the file has twice.

    Args:
        path: of the GGUF file.
        pieces: id → ordinary token, None for others.
        known: token → id, of the reference.
        whose: vocabulary that is.

    Raises:
        ModelError: a token has two ids.
    """
    moved = [(piece, i) for piece, i in ids_of(pieces).items() if known.get(piece, i) != i]
    if moved:
        piece, i = moved[0]
        raise ModelError(
            f"{len(moved)} tokens have other ids than in {whose}, first {piece!r}: {i} here, "
            f"{known[piece]} there",
            where=str(path),
            remedy="Export it again from a directory with the reference's tokenizer.",
        )
