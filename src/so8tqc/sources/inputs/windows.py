"""Long texts cut into windows that a model's context holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from so8tqc.errors import DataError
from so8tqc.sources.protocol import EncodedText, TokenIds
from so8tqc.sources.seen import images_of


def overlapping_windows(
    texts: Sequence[EncodedText], context: int, stride: int, bos: int | None
) -> tuple[EncodedText, ...]:
    """Windows of ``context`` tokens, ``stride`` apart; each token is scored in one of them.

    The scheme of the perplexity guide in transformers' documentation: a window scores what
    the one before it did not reach, so that after a text's first window every scored token
    has at least ``context − stride`` tokens before it. A text that fits is left whole.

    Args:
        texts: whole texts.
        context: N, tokens of a window.
        stride: S, with 0 < S < N.
        bos: the BOS id; where a text begins with it, so does each of its windows (it
            takes the place of the first context token, as in ``llama-perplexity``).

    Raises:
        DataError: a text with pictures is longer than a window.
    """
    return tuple(window for text in texts for window in _windows(text, context, stride, bos))


def _windows(
    text: EncodedText, context: int, stride: int, bos: int | None
) -> Iterator[EncodedText]:
    if images_of(text.tokens) is not None:
        if text.tokens.size > context:
            raise DataError(
                f"{text.tokens.size} tokens with pictures are more than a window of {context}: a "
                "picture is not cut",
                where=text.id,
                remedy="Give a larger --ctx, or leave it out.",
            )
        yield text
        return
    reached = 1  # the first token is predicted by nothing
    for start in range(0, text.tokens.size, stride):
        tokens = text.tokens[start : start + context].copy()
        if bos is not None and text.tokens[0] == bos:
            tokens[0] = bos
        answers = None if text.answers is None else text.answers[start : start + context]
        first = reached - 1 - start
        yield replace(text, tokens=tokens, start=start, first=first, answers=answers)
        reached = start + tokens.size
        if reached == text.tokens.size:
            return


def llama_perplexity_windows(
    tokens: TokenIds, context: int, bos: int | None
) -> tuple[EncodedText, ...]:
    """The windows of ``llama-perplexity``, with and without ``--kl-divergence``.

    ``perplexity()`` in llama.cpp's tools/perplexity/perplexity.cpp: consecutive windows of
    ``context`` tokens, what is left over is dropped; a BOS overwrites the first token of each
    window; predictions of the positions context // 2 … context − 2 are scored, each on
    the token that follows it in the window.

    Args:
        tokens: [T] ids of the whole text, BOS in front if the vocabulary adds one.
        context: tokens of a window (``-c``).
        bos: the BOS id if the vocabulary adds one, else None.

    Returns:
        Each window under an id of its own: windows are what is resampled.

    Raises:
        DataError: fewer than two windows' tokens.
    """
    if tokens.size < 2 * context:
        raise DataError(
            f"{tokens.size} tokens are too few: llama-perplexity wants at least two windows "
            f"of {context}",
            remedy="Give more --data, or a smaller --ctx.",
        )
    windows = tokens[: tokens.size // context * context].reshape(-1, context).copy()
    if bos is not None:
        windows[:, 0] = bos
    return tuple(
        EncodedText(f"window {i + 1}", window, first=context // 2, start=i * context)
        for i, window in enumerate(windows)
    )
