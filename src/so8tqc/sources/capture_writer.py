"""Writing a capture (see ``sources.capture``) block by block, in the memory of one block."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from so8tqc.checkpoints.safetensors_index import ITEM_BYTES, encode_header, torch_dtype
from so8tqc.disk.atomic import atomic_file
from so8tqc.errors import DataError
from so8tqc.progress import SILENT, Progress
from so8tqc.sources.capture import (
    CAPTURE_VERSION,
    TEXTS_KEY,
    VERSION_KEY,
    TextFacts,
    answer_ranges,
    open_capture,
)
from so8tqc.sources.compare import head_rows
from so8tqc.sources.protocol import EncodedText, LogitSource

if TYPE_CHECKING:
    import torch


def capture_bytes(texts: Sequence[EncodedText], vocab_size: int, dtype: str) -> int:
    """Size of a capture's data, bytes; ``dtype`` is a safetensors name."""
    return sum(text.tokens.size for text in texts) * (8 + vocab_size * ITEM_BYTES[dtype])


def write_capture(
    path: Path,
    source: LogitSource,
    texts: Sequence[EncodedText],
    dtype: str,
    metadata: Mapping[str, str],
    progress: Progress = SILENT,
) -> float:
    """Run a source over texts and record its logits, atomically.

    Args:
        path: where to.
        source: the model.
        texts: token ids, each at least two.
        dtype: safetensors name of what logits are rounded to, ``F32``, ``F16`` or ``BF16``.
        metadata: further header entries.
        progress: told about each text, in tokens.

    Returns:
        Largest |Δlogit| that the rounding to ``dtype`` caused; 0 if it caused none.

    Raises:
        DataError: a logit is not finite, or is too large for ``dtype``; nothing is written.
    """
    largest = 0.0
    total = sum(text.tokens.size for text in texts)
    with (
        atomic_file(path) as temporary,
        progress.task("capturing logits", total=total, unit="tokens") as task,
    ):
        with temporary.open("wb") as stream:
            stream.write(_header(texts, source.vocab_size, dtype, metadata))
            for text in texts:
                stream.write(text.tokens.astype("<i8").tobytes())
            for text in texts:
                for error in _write_logits(stream, source, text, torch_dtype(dtype)):
                    largest = max(largest, error)
                task.advance(text.tokens.size, item=text.id)
        open_capture(temporary)  # what cannot be read back must not appear
    return largest


def _header(
    texts: Sequence[EncodedText], vocab_size: int, dtype: str, metadata: Mapping[str, str]
) -> bytes:
    facts = [
        TextFacts(
            id=text.id,
            language=text.language,
            category=text.category,
            answers=answer_ranges(text),
        ).model_dump(exclude_none=True)
        for text in texts
    ]
    header: dict[str, object] = {
        "__metadata__": {
            **metadata,
            VERSION_KEY: CAPTURE_VERSION,
            TEXTS_KEY: json.dumps(facts, ensure_ascii=False),
        }
    }
    tensors = [(f"tokens.{i}", "I64", [t.tokens.size], 8) for i, t in enumerate(texts)]
    row = vocab_size * ITEM_BYTES[dtype]
    tensors += [
        (f"logits.{i}", dtype, [t.tokens.size, vocab_size], row) for i, t in enumerate(texts)
    ]
    offset = 0
    for name, kind, shape, stride in tensors:
        end = offset + shape[0] * stride
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    return encode_header(header)


def _write_logits(
    stream: BinaryIO, source: LogitSource, text: EncodedText, dtype: torch.dtype
) -> Iterator[float]:
    """Write one text's logits; yields each block's largest rounding error."""
    import torch

    start = 0
    for block in source.logits(text.tokens, head_rows(source.vocab_size)):
        stored = block.to(dtype)
        finite = torch.isfinite(stored)
        if not bool(finite.all()):
            raise _not_finite(block, finite, text.id, start, dtype)
        stream.write(stored.cpu().contiguous().view(torch.uint8).numpy().data)
        yield 0.0 if dtype == block.dtype else float((stored.to(block.dtype) - block).abs().max())
        start += block.shape[0]


def _not_finite(
    block: torch.Tensor, finite: torch.Tensor, text: str, start: int, dtype: torch.dtype
) -> DataError:
    import torch

    row, column = (int(i) for i in (~finite).nonzero()[0])
    value = float(block[row, column])
    if bool(torch.isfinite(block[row, column])):
        return DataError(
            f"the logit {value:.6g} at position {start + row} does not fit {dtype}",
            where=text,
            remedy="Capture in float32.",
        )
    return DataError(
        f"the model yields non-finite logits at position {start + row}",
        where=text,
        remedy="The weights hold NaN or infinity, or overflow in the compute dtype.",
    )
