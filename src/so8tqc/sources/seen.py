"""Token ids that stand for pictures, too: what a model is given beside them.

A text with pictures has a placeholder id at every position of a picture. Which positions these are,
and the pixels, travel with the ids themselves, so that no source can be handed the one without the
other. A part of such ids (a slice, a copy) is plain ids again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Embedded:
    """What the text model is given of a text's pictures, computed once, for runtimes that have no
    vision tower of their own.

    Attributes:
        rows: [n, D] float32 embeddings of the positions that are pictures, in order. With deepstack
            D is a multiple of the text model's width: what is added after its first layers follows.
        positions: [3, T] RoPE positions by time, height and width; None where they are 0 … T−1.
        both_ways: attention inside a picture looks ahead, too (Gemma 3).
    """

    rows: npt.NDArray[np.float32]
    positions: npt.NDArray[np.int64] | None
    both_ways: bool


@dataclass(frozen=True)
class Images:
    """The pictures of one text.

    Attributes:
        mask: [T] whether a position is a picture's.
        inputs: further arguments of a transformers model's forward, for a batch of one.
        count: how many pictures.
        embedded: what a text model is given of them; None until a model has computed it.
    """

    mask: npt.NDArray[np.bool_]
    inputs: Mapping[str, torch.Tensor] = field(repr=False)
    count: int
    embedded: Embedded | None = None

    def spans(self) -> list[tuple[int, int]]:
        """[start, stop) of each run of positions that are pictures, in order."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], self.mask, [False]])))
        return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


class SeenTokens(np.ndarray[Any, np.dtype[np.int64]]):
    """[T] token ids with their pictures.

    Attributes:
        images: the pictures; None for a part of such ids.
    """

    images: Images | None

    def __array_finalize__(self, obj: object) -> None:
        """Numpy's own way to make any view: without the pictures, which are of the whole."""
        self.images = None


def embedded_of(given: Mapping[str, Any], images: Images) -> Embedded:
    """What a text model is given, cut to the positions of pictures.

    Args:
        given: the arguments that a model's forward hands to its text model.
        images: which positions are pictures.
    """
    mask = images.mask
    rows = [given["inputs_embeds"][0].float().cpu().numpy()[mask]]
    rows += [deep.float().cpu().numpy() for deep in given.get("deepstack_visual_embeds") or ()]
    positions = given.get("position_ids")
    return Embedded(
        np.ascontiguousarray(np.concatenate(rows, axis=1), dtype=np.float32),
        None if positions is None or positions.ndim != 3 else positions[-3:, 0].cpu().numpy(),
        _looks_ahead(given.get("attention_mask"), images),
    )


def _looks_ahead(masks: Any, images: Images) -> bool:
    """Whether a picture's first position may attend to its next one."""
    span = next(((a, b) for a, b in images.spans() if b - a > 1), None)
    found = list(masks.values()) if isinstance(masks, Mapping) else [masks]
    whole = [m for m in found if m is not None and getattr(m, "ndim", 0) == 4]
    if span is None or not whole:
        return False
    allowed = whole[0][0, 0, span[0], span[0] + 1]
    return bool(allowed) if allowed.dtype.is_floating_point is False else float(allowed) == 0.0


def with_images(tokens: npt.NDArray[np.int64], images: Images) -> SeenTokens:
    """Token ids that carry their pictures."""
    if images.mask.shape != tokens.shape:
        raise ValueError(f"{images.mask.shape} positions are marked, there are {tokens.shape} ids")
    seen: SeenTokens = tokens.view(SeenTokens)
    seen.images = images
    return seen


def images_of(tokens: npt.NDArray[np.int64]) -> Images | None:
    """The pictures of a text; None where it has none."""
    return tokens.images if isinstance(tokens, SeenTokens) else None


def beginning(tokens: npt.NDArray[np.int64], size: int | None) -> npt.NDArray[np.int64]:
    """The first ids of a text; one with pictures is not cut before its last picture ends."""
    images = images_of(tokens)
    if images is None or size is None or size >= tokens.size:
        return tokens[:size] if images is None else tokens
    if images.mask[size:].any():
        return tokens
    inputs = {
        name: value[:, :size] if tuple(value.shape) == (1, tokens.size) else value
        for name, value in images.inputs.items()
    }
    return with_images(
        tokens[:size].copy(), replace(images, mask=images.mask[:size], inputs=inputs)
    )


def scored_positions(tokens: npt.NDArray[np.int64], first: int) -> npt.NDArray[np.int32]:
    """[n] positions whose next token is scored: from ``first`` on, the last and pictures left out.

    A picture's positions predict nothing that was written, and nothing predicts them: neither the
    rows at its positions count, nor the row in front of it.
    """
    positions = np.arange(first, tokens.size - 1, dtype=np.int32)
    images = images_of(tokens)
    if images is None:
        return positions
    return positions[~images.mask[positions] & ~images.mask[positions + 1]]


def conditioned(tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int32]) -> Any:
    """[n] int32: how many positions of pictures stand in front of each; 0 in a text without."""
    images = images_of(tokens)
    if images is None:
        return np.zeros(positions.size, dtype=np.int32)
    return np.cumsum(images.mask, dtype=np.int32)[positions]
