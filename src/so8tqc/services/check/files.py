"""GGUF files by themselves, and against the digests that their record holds. No model is run."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from so8tqc.disk.digests import file_ref
from so8tqc.errors import MissingToolError, ModelError, ToolError
from so8tqc.gguf.file import GGUFFile, GGUFTensor, open_gguf
from so8tqc.gguf.rewrite import key_values
from so8tqc.record_kinds.quantize import QuantizeMetrics
from so8tqc.records import Check, judge
from so8tqc.services.attest.chain import Step
from so8tqc.services.qc.compatibility import require_same_tokens
from so8tqc.services.quantize.derivation import tensor_digests
from so8tqc.wording import listed

_WEIGHTS_AT_ONCE = 1 << 17
"""Half a MiB of float32: it stays in a core's cache."""

_INTEGERS = frozenset({"I8", "I16", "I32", "I64"})
_STRING, _ARRAY, _INT32 = 8, 9, 5
_ORDINARY = 1
"""``LLAMA_TOKEN_TYPE_NORMAL``: a token that is a piece of text."""


def finite_check(gguf: GGUFFile) -> Check:
    """``file.finite``: tensors that hold a NaN or an infinity, dequantized."""
    broken = [name for name, tensor in gguf.tensors.items() if not _is_finite(tensor)]
    return judge(
        "file.finite",
        len(broken),
        0,
        detail=f"Tensors with NaN or infinity: {listed(broken)}."
        if broken
        else f"All {len(gguf.tensors)} tensors are whole and finite.",
    )


def _is_finite(tensor: GGUFTensor) -> bool:
    if tensor.type in _INTEGERS:
        return True
    if tensor.type in ("F32", "F16", "F64"):
        return bool(np.isfinite(tensor.data).all())
    try:
        from so8tqc.llama.ggml import dequantizer

        convert = dequantizer(tensor.type)
    except (MissingToolError, ToolError):
        return bool(np.isfinite(tensor.values()).all())
    columns = tensor.shape[-1]
    rows = tensor.elements // columns
    stored, step = tensor.raw.reshape(rows, -1), max(1, _WEIGHTS_AT_ONCE // columns)
    buffer = np.empty(step * columns, dtype=np.float32)
    for start in range(0, rows, step):
        values = buffer[: min(step, rows - start) * columns]
        convert(stored[start : start + step], values)
        if not np.isfinite(values).all():
            return False
    return True


def recorded_check(gguf: GGUFFile, step: Step) -> Check:
    """``file.recorded``: what differs from the digests that the record of its making holds."""
    path = gguf.path
    reference = next(
        ref for ref in step.record.outputs.values() if Path(ref.path).name == path.name
    )
    if file_ref(path).sha256 == reference.sha256:
        detail = f"Byte by byte the file that {step.kind} recorded ({step.path.name})."
        return judge("file.recorded", 0, 0, detail=detail)
    parts = _differing(gguf, step) or ["its header: key-values, such as the tokenizer's"]
    return judge(
        "file.recorded",
        len(parts),
        0,
        detail=f"Not the file that {step.kind} recorded ({step.path.name}); different: "
        f"{listed(parts)}.",
    )


def _differing(gguf: GGUFFile, step: Step) -> list[str]:
    """Tensors with other bytes, where the record has the digest of each."""
    if step.kind != "quantize":
        return ["its bytes"]
    derived = QuantizeMetrics.of(step.record).derivation
    recorded = {} if derived is None else derived.tensors.get(gguf.path.name, {})
    if not recorded:
        return ["its bytes"]
    found = tensor_digests(gguf)
    return sorted(n for n in found.keys() | recorded.keys() if found.get(n) != recorded.get(n))


def token_check(path: Path, directory: Path) -> Check | None:
    """``file.tokens``: whether each token of a GGUF file has the id that a tokenizer gives it.

    Returns:
        None where one of them is of a kind that is not read here.
    """
    known = _vocabulary(directory)
    pieces = _pieces(path)
    if not known or not pieces:
        return None
    try:
        require_same_tokens(path, pieces, known, f"the tokenizer of {directory.name}")
    except ModelError as error:
        return judge("file.tokens", 1, 0, detail=f"{error.what[0].upper()}{error.what[1:]}.")
    ordinary = [piece for piece in pieces if piece is not None]
    told = sum(piece in known for piece in ordinary)
    if 2 * told < len(ordinary):
        detail = f"Only {told} of {len(ordinary)} tokens are in the tokenizer of {directory.name}."
        return judge("file.tokens", len(ordinary) - told, 0, detail=detail)
    detail = f"Its tokens have the ids that the tokenizer of {directory.name} gives them."
    return judge("file.tokens", 0, 0, detail=detail)


def _vocabulary(directory: Path) -> Mapping[str, int]:
    """Token → id of a ``tokenizer.json`` with a vocabulary of pieces; {} of others."""
    file = directory / "tokenizer.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        known = content["model"]["vocab"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    if isinstance(known, list):  # unigram: [[piece, score], …]
        return {str(entry[0]): i for i, entry in enumerate(known) if isinstance(entry, list)}
    return {str(k): v for k, v in known.items() if isinstance(v, int)} if known else {}


def _pieces(path: Path) -> list[str | None]:
    """The tokens of a GGUF file by id; None for those that are no piece of text."""
    keys = key_values(path)
    words = _strings(keys.get("tokenizer.ggml.tokens", b""))
    kinds = _integers(keys.get("tokenizer.ggml.token_type", b""))
    if len(kinds) != len(words):
        kinds = [_ORDINARY] * len(words)
    return [w if k == _ORDINARY else None for w, k in zip(words, kinds, strict=True)]


def _strings(stored: bytes) -> list[str]:
    """An array of strings as GGUF stores it, little-endian; [] of anything else."""
    head = struct.Struct("<IIQ")
    if len(stored) < head.size:
        return []
    kind, inner, count = head.unpack_from(stored)
    if (kind, inner) != (_ARRAY, _STRING):
        return []
    size, place, found = struct.Struct("<Q"), head.size, []
    try:
        for _ in range(count):
            (length,) = size.unpack_from(stored, place)
            place += size.size
            found.append(stored[place : place + length].decode("utf-8", "replace"))
            place += length
    except struct.error:
        return []
    return found


def _integers(stored: bytes) -> list[int]:
    head = struct.Struct("<IIQ")
    if len(stored) < head.size:
        return []
    kind, inner, count = head.unpack_from(stored)
    if (kind, inner) != (_ARRAY, _INT32) or len(stored) < head.size + 4 * count:
        return []
    return [int(v) for v in np.frombuffer(stored, dtype="<i4", count=count, offset=head.size)]


def whole(path: Path) -> GGUFFile:
    """The file, or the model of which it is a part."""
    from so8tqc.disk.parts import part_name, part_paths

    parts = part_paths(path) if part_name(path) is not None else (path,)
    return open_gguf(parts[0])
