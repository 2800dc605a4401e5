"""A reference recorded elsewhere: token ids and logits in one safetensors file.

Format, version 1 (``docs/capture.md`` is for those who write it). For text ``i = 0, 1, …``

* ``tokens.i``: [T] int64 or int32, T ≥ 2, each id in [0, V);
* ``logits.i``: [T, V] float32, float16 or bfloat16, one V and one dtype in the whole file. Row
  ``t`` holds the logits of the token that follows ``tokens[: t + 1]``, so positions are 0 … T−1.

and nothing else. Header metadata: ``so8t.capture_version`` is ``"1"``; optional are ``so8t.texts``
(a JSON list of ``{"id", "language", "category"}``, one for each text, and of a conversation
``"answers"``, [start, stop) of the tokens that are scored), ``so8t.vocabulary_sha256``
(see :func:`vocabulary_digest`) and ``so8t.source`` (free text: what was recorded).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import numpy as np
from pydantic import BaseModel, ConfigDict, StringConstraints, TypeAdapter, ValidationError

from so8tqc.checkpoints.safetensors_index import (
    ITEM_BYTES,
    TensorEntry,
    mapped,
    read_header,
    read_metadata,
    torch_dtype,
)
from so8tqc.disk.digests import sha256_json
from so8tqc.errors import DataError
from so8tqc.sources.protocol import EncodedText, LogitSource, TokenIds
from so8tqc.sources.seen import beginning, images_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

CAPTURE_VERSION = "1"
VERSION_KEY = "so8t.capture_version"
TEXTS_KEY = "so8t.texts"
VOCABULARY_KEY = "so8t.vocabulary_sha256"
SOURCE_KEY = "so8t.source"

MAX_TOKENS = 1 << 24
"""More tokens than any capture holds (at V = 32,000 they would be a terabyte of logits)."""

_NAME = re.compile(r"(tokens|logits)\.(0|[1-9][0-9]{0,8})")
_TOKEN_DTYPES = {"I64": "<i8", "I32": "<i4"}
_LOGIT_DTYPES = ("F32", "F16", "BF16")


class TextFacts(BaseModel):
    """What a capture says of one text."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    id: Annotated[str, StringConstraints(min_length=1)]
    language: str = ""
    category: str = ""
    answers: tuple[tuple[int, int], ...] | None = None
    """Of a conversation, [start, stop) of the tokens that are scored; None: all of them."""


_FACTS = TypeAdapter(tuple[TextFacts, ...])


@dataclass(frozen=True)
class Capture:
    """A validated capture file; its logits stay on disk.

    Attributes:
        path: the file.
        texts: what was recorded, in order.
        logits: where each text's logits lie.
        vocab_size: V.
        vocabulary_sha256: digest of the tokenizer's vocabulary, "" if the file has none.
        source: what the file says it was recorded from, "" if nothing.
    """

    path: Path
    texts: tuple[EncodedText, ...]
    logits: tuple[TensorEntry, ...]
    vocab_size: int
    vocabulary_sha256: str
    source: str

    @property
    def dtype(self) -> torch.dtype:
        """What the logits are stored in."""
        return torch_dtype(self.logits[0].dtype)

    @property
    def tokens(self) -> int:
        """Recorded tokens of all texts."""
        return sum(text.tokens.size for text in self.texts)


def is_capture(path: Path) -> bool:
    """Whether a path names a capture file rather than a model directory or a GGUF file."""
    return path.suffix.lower() == ".safetensors"


def capture_if_one(path: Path) -> Capture | None:
    """The capture at a path, or None where a model is.

    Raises:
        ModelError, DataError: as :func:`open_capture`.
    """
    return open_capture(path) if is_capture(path) else None


def open_capture(path: Path) -> Capture:
    """Open and validate a capture; token ids are read, logits are not.

    Raises:
        ModelError: missing, truncated, or no safetensors file.
        DataError: no capture, an unknown version, tensors missing, extra, of another dtype or of
            shapes that disagree, token ids outside the vocabulary, fewer than two tokens.
    """
    entries = {entry.name: entry for entry in read_header(path)}
    metadata = read_metadata(path)
    _check_version(metadata, path)
    pairs = _pairs(entries, path)
    _check_tensors(pairs, path)
    vocab_size = pairs[0][1].shape[1]
    facts = _facts(metadata, len(pairs), path)
    return Capture(
        path=path,
        texts=tuple(
            _encoded(fact, _token_ids(tokens, vocab_size, path), path)
            for fact, (tokens, _) in zip(facts, pairs, strict=True)
        ),
        logits=tuple(logits for _, logits in pairs),
        vocab_size=vocab_size,
        vocabulary_sha256=metadata.get(VOCABULARY_KEY, ""),
        source=metadata.get(SOURCE_KEY, ""),
    )


def _encoded(fact: TextFacts, tokens: TokenIds, path: Path) -> EncodedText:
    """A recorded text, its answers marked where the file names them.

    Raises:
        DataError: a range that is none of its tokens, or no answer at all.
    """
    text = EncodedText(fact.id, tokens, fact.language, fact.category)
    if fact.answers is None:
        return text
    answers = np.zeros(tokens.size, dtype=bool)
    for start, stop in fact.answers:
        if not 0 <= start < stop <= tokens.size:
            raise DataError(f"text {fact.id} has no tokens {start} to {stop}", where=str(path))
        answers[start:stop] = True
    if not answers[1:].any():
        raise DataError(f"text {fact.id} has no token that is scored", where=str(path))
    return replace(text, answers=answers)


def answer_ranges(text: EncodedText) -> tuple[tuple[int, int], ...] | None:
    """[start, stop) of the runs of tokens that are scored; None if all are."""
    if text.answers is None:
        return None
    edges = np.flatnonzero(np.diff(np.concatenate([[False], text.answers, [False]]).astype(int)))
    return tuple((int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True))


def cut(texts: Sequence[EncodedText], max_tokens: int | None) -> tuple[EncodedText, ...]:
    """The first ``max_tokens`` tokens of each text; a capture yields the logits of those too."""
    return tuple(text.upto(max_tokens) for text in texts)


def with_pictures(capture: Capture, data: Sequence[EncodedText]) -> Capture:
    """A capture whose texts have the pictures that they were recorded with.

    Args:
        capture: the capture; it holds token ids alone.
        data: the texts that it was recorded on, uncut, as :func:`check_same_tokens` found them.
    """
    texts = []
    for recorded, given in zip(capture.texts, data, strict=True):
        tokens = beginning(given.tokens, recorded.tokens.size)
        same = images_of(tokens) is not None and tokens.size == recorded.tokens.size
        texts.append(replace(recorded, tokens=tokens) if same else recorded)
    return replace(capture, texts=tuple(texts))


def check_same_tokens(capture: Capture, data: Sequence[EncodedText]) -> None:
    """See that a capture was recorded on these texts.

    Args:
        capture: the capture.
        data: the texts' tokens, uncut; a text may have been recorded only up to some token.

    Raises:
        DataError: another number of texts, or a token that differs.
    """
    remedy = "Leave --data out: the texts are taken from the capture."
    if len(data) != len(capture.texts):
        raise DataError(
            f"the capture holds {len(capture.texts)} texts, the data {len(data)}",
            where=str(capture.path),
            remedy=remedy,
        )
    for recorded, given in zip(capture.texts, data, strict=True):
        both = min(recorded.tokens.size, given.tokens.size)
        differing = np.flatnonzero(recorded.tokens[:both] != given.tokens[:both])
        if differing.size or both < recorded.tokens.size:
            at = int(differing[0]) if differing.size else both
            raise DataError(
                f"text {recorded.id} differs from the data ({given.id}) at token {at}",
                where=str(capture.path),
                remedy=remedy,
            )


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a tokenizer's token → id mapping as canonical JSON (sorted keys, no spaces)."""
    return sha256_json(tokenizer.get_vocab())


class CaptureSource:
    """A capture as a logit source, for the texts that it holds and their beginnings.

    Args:
        capture: the opened file.
        name: label for reports.
    """

    def __init__(self, capture: Capture, name: str) -> None:
        self.capture = capture
        self.name = name
        self.vocab_size = capture.vocab_size

    def logits(self, tokens: TokenIds, rows: int, first: int = 0) -> Iterator[torch.Tensor]:
        """See :class:`so8tqc.sources.protocol.LogitSource`.

        Raises:
            DataError: the tokens were not recorded, or a logit is not finite.
        """
        index = self._find(tokens)
        entry = self.capture.logits[index]
        with entry.file.open("rb") as stream:
            stream.seek(entry.start + first * entry.shape[1] * ITEM_BYTES[entry.dtype])
            for start in range(first, tokens.size, rows):
                block = _read_rows(stream, entry, min(rows, tokens.size - start))
                self._check_finite(block, self.capture.texts[index].id, start)
                yield block

    def close(self) -> None:
        """Do nothing: a capture holds no model."""

    def _find(self, tokens: TokenIds) -> int:
        for index, text in enumerate(self.capture.texts):
            if np.array_equal(text.tokens[: tokens.size], tokens):
                return index
        raise DataError(
            f"a text of {tokens.size} tokens was not recorded", where=str(self.capture.path)
        )

    def _check_finite(self, block: torch.Tensor, text: str, start: int) -> None:
        import torch

        finite = torch.isfinite(block)
        if not bool(finite.all()):
            row, token = (int(i) for i in (~finite).nonzero()[0])
            raise DataError(
                f"text {text} has a non-finite logit at position {start + row}, token {token}",
                where=str(self.capture.path),
                remedy="Record it again; mask nothing, and store float32 where float16 overflows.",
            )


class RoundedSource:
    """Another source, with logits rounded as a capture stores them: the capture's own error.

    Args:
        source: what is rounded.
        dtype: of the capture.
    """

    def __init__(self, source: LogitSource, dtype: torch.dtype) -> None:
        self.name = source.name
        self.vocab_size = source.vocab_size
        self._source = source
        self._dtype = dtype

    def logits(self, tokens: TokenIds, rows: int, first: int = 0) -> Iterator[torch.Tensor]:
        """See :class:`so8tqc.sources.protocol.LogitSource`."""
        for block in self._source.logits(tokens, rows, first):
            yield block.to(self._dtype).to(block.dtype)

    def close(self) -> None:
        """Release the source."""
        self._source.close()


def _read_rows(stream: BinaryIO, entry: TensorEntry, rows: int) -> torch.Tensor:
    """The next ``rows`` rows as [rows, V] float32; read, not mapped, so that memory stays small."""
    import torch

    width = entry.shape[1]
    raw = bytearray(rows * width * ITEM_BYTES[entry.dtype])
    if stream.readinto(raw) != len(raw):  # type: ignore[attr-defined]
        raise DataError(
            "the file ends within its logits",
            where=str(entry.file),
            remedy="It was cut after it was opened: copy it again, or record it again.",
        )
    block = torch.frombuffer(raw, dtype=torch_dtype(entry.dtype)).reshape(rows, width)
    return block.to(torch.float32)


def _check_version(metadata: Mapping[str, str], path: Path) -> None:
    version = metadata.get(VERSION_KEY)
    if version is None:
        raise DataError(
            f"not a capture: the header has no {VERSION_KEY}",
            where=str(path),
            remedy="A model is given as its directory; captures are made by so8tqc capture.",
        )
    if version != CAPTURE_VERSION:
        raise DataError(
            f"{VERSION_KEY} is {version[:20]!r}, this version reads {CAPTURE_VERSION!r}",
            where=str(path),
        )


def _pairs(entries: Mapping[str, TensorEntry], path: Path) -> list[tuple[TensorEntry, TensorEntry]]:
    """(tokens, logits) of each text, in order."""
    for name in entries:
        if not _NAME.fullmatch(name):
            raise DataError(
                f"unexpected tensor {name[:80]!r}; a capture holds tokens.N and logits.N",
                where=str(path),
            )
    if not entries:
        raise DataError("the capture holds no text", where=str(path))
    count = (len(entries) + 1) // 2
    for number in range(count):
        for name in (f"tokens.{number}", f"logits.{number}"):
            if name not in entries:
                raise DataError(
                    f"tensor {name} is missing; texts are numbered from 0 without gaps",
                    where=str(path),
                )
    return [(entries[f"tokens.{i}"], entries[f"logits.{i}"]) for i in range(count)]


def _check_tensors(pairs: Sequence[tuple[TensorEntry, TensorEntry]], path: Path) -> None:
    first = pairs[0][1]
    for tokens, logits in pairs:
        if tokens.dtype not in _TOKEN_DTYPES or len(tokens.shape) != 1:
            raise _odd(tokens, "[T] int64 or int32", path)
        if logits.dtype not in _LOGIT_DTYPES or len(logits.shape) != 2:
            raise _odd(logits, "[T, V] float32, float16 or bfloat16", path)
        if tokens.shape[0] != logits.shape[0]:
            raise DataError(
                f"{tokens.name} has {tokens.shape[0]} tokens, {logits.name} has "
                f"{logits.shape[0]} rows",
                where=str(path),
            )
        if tokens.shape[0] < 2:
            raise DataError(
                f"{tokens.name} has {tokens.shape[0]} token(s); next-token statistics need at "
                "least two",
                where=str(path),
            )
        if (logits.shape[1], logits.dtype) != (first.shape[1], first.dtype):
            raise DataError(
                f"{logits.name} is {logits.dtype} with {logits.shape[1]} vocabulary entries, "
                f"{first.name} is {first.dtype} with {first.shape[1]}",
                where=str(path),
            )
    if (total := sum(tokens.shape[0] for tokens, _ in pairs)) > MAX_TOKENS:
        raise DataError(f"{total} tokens are more than {MAX_TOKENS}", where=str(path))


def _odd(entry: TensorEntry, expected: str, path: Path) -> DataError:
    return DataError(
        f"{entry.name} is {entry.dtype} of shape {list(entry.shape)}, expected {expected}",
        where=str(path),
    )


def _token_ids(entry: TensorEntry, vocab_size: int, path: Path) -> TokenIds:
    with mapped(entry) as raw:
        tokens: TokenIds = np.array(raw.view(_TOKEN_DTYPES[entry.dtype]), dtype=np.int64)
    outside = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if outside.size:
        at = int(outside[0])
        raise DataError(
            f"{entry.name}: id {tokens[at]} at position {at} is outside the vocabulary of "
            f"{vocab_size}",
            where=str(path),
        )
    return tokens


def _facts(metadata: Mapping[str, str], count: int, path: Path) -> tuple[TextFacts, ...]:
    if TEXTS_KEY not in metadata:
        return tuple(TextFacts(id=f"text-{i + 1}") for i in range(count))
    try:
        facts = _FACTS.validate_json(metadata[TEXTS_KEY])
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{part!r}]" for part in first["loc"])
        raise DataError(
            f"header entry {TEXTS_KEY}{place}: {first['msg']}", where=str(path)
        ) from None
    if len(facts) != count:
        raise DataError(f"{TEXTS_KEY} names {len(facts)} texts of {count}", where=str(path))
    if len({fact.id for fact in facts}) != count:
        raise DataError(f"{TEXTS_KEY} names two texts alike", where=str(path))
    return facts
