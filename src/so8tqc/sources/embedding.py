"""Pictures turned into embeddings once, for the sources that have no vision tower of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from so8tqc.sources.gguf import GGUFSource
from so8tqc.sources.hf import HFModel
from so8tqc.sources.protocol import EncodedText, LogitSource
from so8tqc.sources.seen import images_of, with_images


def with_embedded(
    texts: Sequence[EncodedText],
    sources: Sequence[LogitSource],
    load: Callable[[], HFModel],
    *,
    files_follow: bool = False,
) -> tuple[EncodedText, ...]:
    """The texts, their pictures embedded where a source needs it.

    Vision tower and projector are those of the first source that runs in transformers; gates act
    on the text model alone, so that it does not matter which of them it is.

    Args:
        texts: some with pictures.
        sources: that will be asked for logits.
        load: gives a model directory with a vision tower, where none of the sources is one.
        files_follow: GGUF files will be asked, too, which are not among the sources yet.

    Raises:
        DataError: pictures that do not fit their positions.
        ModelError: as ``load``.
    """
    seeing = any(images_of(text.tokens) is not None for text in texts)
    files = files_follow or any(isinstance(source, GGUFSource) for source in sources)
    if not seeing or not files:
        return tuple(texts)
    held = (getattr(source, "model", None) for source in sources)
    model = next((found for found in held if isinstance(found, HFModel)), None)
    if model is not None:
        return tuple(_embedded(text, model) for text in texts)
    loaded = load()
    try:
        return tuple(_embedded(text, loaded) for text in texts)
    finally:
        loaded.close()


def _embedded(text: EncodedText, model: HFModel) -> EncodedText:
    images = images_of(text.tokens)
    if images is None:
        return text
    seen = replace(images, embedded=model.embedded(text.tokens))
    return replace(text, tokens=with_images(text.tokens.copy(), seen))
