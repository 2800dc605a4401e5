"""Which texts a temperature is fitted on, and which judge it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from so8tqc.errors import DataError
from so8tqc.metrics.temperature.table import IntArray
from so8tqc.sources.protocol import EncodedText


@dataclass(frozen=True)
class Split:
    """Indices of the texts of either side, ascending; they share none and leave none out."""

    fit: IntArray
    holdout: IntArray


def split_texts(texts: Sequence[EncodedText], share: float, seed: int) -> Split:
    """Split texts, stratified by language and, within a language, by category.

    The texts are laid out language by language, category by category, in an order drawn by
    the seed, and held out *systematically*: text i is, if ⌊(i + 1)·share + u⌋ > ⌊i·share + u⌋ with
    a seeded u in [0, 1). So every run of consecutive texts (a language, a category with several
    texts) has its share of them to within one, however many categories have but one text.

    The order follows from hashes of seed, category and text id, hence from neither the order
    of the files nor a library's random generator.

    Args:
        texts: with distinct ids.
        share: of the texts to hold out, in (0, 1).
        seed: of the split.

    Raises:
        DataError: one of the sides would be empty.
    """
    order = sorted(
        range(len(texts)),
        key=lambda i: (
            texts[i].language,
            _draw(seed, texts[i].language, texts[i].category),
            _draw(seed, texts[i].id),
        ),
    )
    steps = np.floor(np.arange(len(texts) + 1) * share + _draw(seed))
    held = sorted(i for i, (a, b) in zip(order, pairwise(steps), strict=True) if b > a)
    fit = sorted(set(order) - set(held))
    if not held or not fit:
        raise DataError(
            f"{len(texts)} text(s) with a held-out share of {share} leave nothing to "
            f"{'judge on' if not held else 'fit on'}",
            remedy="Give more texts, or another holdout share.",
        )
    return Split(fit=np.array(fit, dtype=np.intp), holdout=np.array(held, dtype=np.intp))


def _draw(seed: int, *parts: str) -> float:
    """A number in [0, 1) that depends on the arguments alone."""
    digest = hashlib.sha256("\0".join([str(seed), *parts]).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
