"""Which tokens ``qc`` scores: the protocols."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from so8tqc.config import QCConfig
from so8tqc.gguf.file import is_gguf
from so8tqc.llama.isolated import tokenize
from so8tqc.sources.inputs.texts import concatenated, encode, encode_plain, load_texts
from so8tqc.sources.inputs.windows import llama_perplexity_windows, overlapping_windows
from so8tqc.sources.protocol import EncodedText, TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS_OF_A_TEXT = 256
"""Used of each text when neither a limit nor a window is asked for."""

LLAMA_PERPLEXITY_CONTEXT = 512
"""``llama-perplexity``'s own default window."""


def evaluation_texts(
    config: QCConfig, load_tokenizer: Callable[[], PreTrainedTokenizerBase]
) -> tuple[EncodedText, ...]:
    """The texts and windows to compare models on (see docs/protocols.md).

    Args:
        config: ``data``, ``protocol``, ``ctx``, ``stride``, ``max_tokens``, the models.
        load_tokenizer: gives the transformers tokenizer, if one is needed.

    Raises:
        DataError: unreadable data, a text of one token, too little text for two windows.
        ModelError: there is no usable tokenizer.
    """
    if config.protocol == "llama-perplexity":
        tokens, bos = _concatenated_tokens(config, load_tokenizer)
        return llama_perplexity_windows(
            tokens[: config.max_tokens], config.ctx or LLAMA_PERPLEXITY_CONTEXT, bos
        )
    tokenizer = load_tokenizer()
    if config.ctx is None:
        return encode(load_texts(config.data), tokenizer, config.max_tokens or TOKENS_OF_A_TEXT)
    texts = encode(load_texts(config.data), tokenizer, config.max_tokens)
    stride = config.stride or config.ctx // 2
    return overlapping_windows(texts, config.ctx, stride, tokenizer.bos_token_id)


def _concatenated_tokens(
    config: QCConfig, load_tokenizer: Callable[[], PreTrainedTokenizerBase]
) -> tuple[TokenIds, int | None]:
    """All texts as one, by the first GGUF file's vocabulary, and the BOS that it adds."""
    text = concatenated(load_texts(config.data))
    files = [path for path in (config.reference, *config.candidates) if is_gguf(path)]
    if files and config.tokenizer is None:
        return tokenize(files[0], text)
    return encode_plain(text, load_tokenizer())
