"""All readings side by side on one loaded base, in one pass over the text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from so8tqc.metrics.divergence import TokenTable
from so8tqc.progress import Progress
from so8tqc.rotations.rotation_set import RotationSet
from so8tqc.services.identify.candidates import Candidate
from so8tqc.sources.capture import Capture, CaptureSource, RoundedSource
from so8tqc.sources.compare import compare
from so8tqc.sources.gated import GatedSource
from so8tqc.sources.hf import HFModel, HFSource
from so8tqc.sources.inputs.texts import encode, load_texts
from so8tqc.sources.protocol import EncodedText, LogitSource
from so8tqc.sources.seen import beginning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NONE = "none"
"""The base without gates, as a reading."""

RECORDED = "recorded"
_ROUNDED = "rounded"
_SHORTEST = 8
"""Tokens of a window that is worth a place; a whole text may be shorter."""


def training_windows(
    data: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, most: int
) -> tuple[EncodedText, ...]:
    """Texts cut into windows that follow one another, of which evenly spread ones are kept.

    Each window is a text of its own: one long file of training text gives as many independent
    differences as it has windows.

    Args:
        data: as of ``load_texts``.
        tokenizer: of the base.
        length: tokens of a window.
        most: windows kept.

    Raises:
        DataError: unreadable data, a text of one token.
    """
    found = [
        window
        for text in encode(load_texts(data), tokenizer, None)
        for window in _windows(text, length, tokenizer.bos_token_id)
    ]
    return spread(found, most)


def recorded_texts(capture: Capture, length: int, most: int) -> tuple[EncodedText, ...]:
    """The beginnings of the texts that were recorded, evenly spread ones of many."""
    return spread([replace(t, tokens=beginning(t.tokens, length)) for t in capture.texts], most)


def spread(texts: Sequence[EncodedText], most: int) -> tuple[EncodedText, ...]:
    """At most ``most`` of them, evenly spread."""
    if len(texts) <= most:
        return tuple(texts)
    return tuple(texts[i] for i in np.linspace(0, len(texts) - 1, most).round().astype(int))


def _windows(text: EncodedText, length: int, bos: int | None) -> Iterator[EncodedText]:
    for number, start in enumerate(range(0, text.tokens.size, length)):
        tokens = text.tokens[start : start + length].copy()
        if number and tokens.size < _SHORTEST:
            return
        if bos is not None and text.tokens[0] == bos:
            tokens[0] = bos
        name = text.id if text.tokens.size <= length else f"{text.id} window {number + 1}"
        yield replace(text, id=name, tokens=tokens, start=start)


def against_base(
    model: HFModel,
    readings: Sequence[Candidate],
    texts: Sequence[EncodedText],
    progress: Progress,
) -> dict[str, TokenTable]:
    """Reading → its table against the base without gates."""
    sources: list[LogitSource] = [HFSource(model, NONE)]
    sources += [GatedSource(model, each.rotations, each.name) for each in readings]
    pairs = [(NONE, each.name) for each in readings]
    tables = compare(sources, pairs, texts, progress, "running every reading")
    return {name: table for (_, name), table in tables.items()}


def against_capture(
    model: HFModel,
    readings: Sequence[Candidate],
    capture: Capture,
    texts: Sequence[EncodedText],
    progress: Progress,
) -> dict[str, TokenTable]:
    """Reading → its table against the recorded logits, the base without gates among them."""
    sources: list[LogitSource] = [CaptureSource(capture, RECORDED), HFSource(model, NONE)]
    sources += [GatedSource(model, each.rotations, each.name) for each in readings]
    pairs = [(RECORDED, source.name) for source in sources[1:]]
    tables = compare(sources, pairs, texts, progress, "running every reading")
    return {name: table for (_, name), table in tables.items()}


def storage_rounding(
    model: HFModel,
    rotations: RotationSet | None,
    capture: Capture,
    texts: Sequence[EncodedText],
    progress: Progress,
) -> float:
    """Mean KL that storing a model's own logits as a capture does costs, nats; 0 in float32."""
    import torch

    if capture.dtype is torch.float32:
        return 0.0

    def source(name: str) -> LogitSource:
        return HFSource(model, name) if rotations is None else GatedSource(model, rotations, name)

    sources = [source(NONE), RoundedSource(source(_ROUNDED), capture.dtype)]
    pair = (NONE, _ROUNDED)
    table = compare(sources, [pair], texts, progress, "measuring the capture's rounding")[pair]
    return float(table.columns["kl"].mean())


def extent(tables: Mapping[str, TokenTable]) -> tuple[int, int]:
    """(texts, tokens) that were scored."""
    table = next(iter(tables.values()))
    return len(table.texts), len(table)
