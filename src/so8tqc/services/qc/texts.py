"""Which tokens ``qc`` scores: the protocols."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from so8tqc.config import QCConfig
from so8tqc.gguf.file import is_gguf
from so8tqc.llama.isolated import tokenize
from so8tqc.sources.inputs.prepared import Prepared, prepare
from so8tqc.sources.inputs.texts import concatenated, encode_plain, read_texts
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
    """The texts and windows of :func:`prepared_texts` alone."""
    return prepared_texts(config, load_tokenizer).texts


def prepared_texts(
    config: QCConfig, load_tokenizer: Callable[[], PreTrainedTokenizerBase]
) -> Prepared:
    """The texts and windows to compare models on (see docs/protocols.md).

    Args:
        config: ``data``, ``protocol``, ``ctx``, ``stride``, ``max_tokens``, the models.
        load_tokenizer: gives the transformers tokenizer, if one is needed.

    Raises:
        DataError: unreadable data, a text of one token, too little text for two windows.
        ModelError: there is no usable tokenizer.
    """
    if config.protocol == "llama-perplexity":
        return _of_llama_perplexity(config, load_tokenizer)
    tokenizer = load_tokenizer()
    if config.ctx is None:
        limit = config.max_tokens or TOKENS_OF_A_TEXT
        return prepare(config.data, tokenizer, limit, images=config.images, chat=config.chat)
    found = prepare(
        config.data, tokenizer, config.max_tokens, images=config.images, chat=config.chat
    )
    stride = config.stride or config.ctx // 2
    windows = overlapping_windows(found.texts, config.ctx, stride, tokenizer.bos_token_id)
    return found._replace(texts=windows)


def _of_llama_perplexity(
    config: QCConfig, load_tokenizer: Callable[[], PreTrainedTokenizerBase]
) -> Prepared:
    texts, notices = read_texts(config.data)
    tokens, bos = _tokens(concatenated(texts), config, load_tokenizer)
    context = config.ctx or LLAMA_PERPLEXITY_CONTEXT
    windows = llama_perplexity_windows(tokens[: config.max_tokens], context, bos)
    return Prepared(windows, notices)


def _tokens(
    text: str, config: QCConfig, load_tokenizer: Callable[[], PreTrainedTokenizerBase]
) -> tuple[TokenIds, int | None]:
    """Of a text, by the first GGUF file's vocabulary, and the BOS that it adds."""
    files = [path for path in (config.reference, *config.candidates) if is_gguf(path)]
    if files and config.tokenizer is None:
        return tokenize(files[0], text)
    return encode_plain(text, load_tokenizer())
