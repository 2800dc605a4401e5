"""Token tables that earlier calls computed, kept by what they were computed from.

A pair of models on some texts gives the same table whenever the bytes of both, the tokens, what
computes and how are the same; limits, profiles and the bootstrap only judge it. So an *evaluation*
is kept in the user's cache under a digest of exactly these, and ``qc`` with one more candidate runs
the reference and that candidate. Nothing is believed by its name or its time of change.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from so8tqc.adapters.files import adapter_fingerprint
from so8tqc.closure import own_sources
from so8tqc.config import QCConfig
from so8tqc.disk.digests import sha256_file, sha256_json
from so8tqc.disk.parts import parts_here
from so8tqc.errors import InputError, MissingToolError, So8tqcError
from so8tqc.gguf.file import is_gguf
from so8tqc.llama.build import library_build
from so8tqc.llama.vendor import find_converter
from so8tqc.metrics.divergence import TokenTable
from so8tqc.records import versions
from so8tqc.resources import user_cache
from so8tqc.rotations.rotation_set import RotationSet
from so8tqc.services.qc.planned import (
    ARITHMETIC,
    BASE,
    GATED,
    REFERENCE,
    Planned,
    base_of,
    floor_name,
    fold_name,
    input_directory,
)
from so8tqc.services.qc.token_file import read_tokens, write_tokens
from so8tqc.sources import ranks
from so8tqc.sources.compare import Pair
from so8tqc.sources.protocol import EncodedText
from so8tqc.sources.seen import images_of

MOST_BYTES = 1 << 30
"""Of all that is kept; what was longest not used goes first."""

_MODEL_FILES = (".safetensors", ".json", ".bin", ".pt", ".pth", ".model", ".txt", ".jinja")


@dataclass(frozen=True)
class Kept:
    """A table of an earlier call."""

    table: TokenTable
    made: datetime


class Evaluations:
    """The tables of one call's pairs, among those that are kept.

    Args:
        folder: where they are; None: nothing is kept, nothing is found.
        common: what all pairs of the call share, as :func:`_common_key` gives it.
        identities: source → digest of what it computes its logits from.
        texts: what is scored; a table of other positions is none of this call's.
        routing: what a mark of a tie depends on beside the pair (see ``services.qc.ties``).
    """

    def __init__(
        self,
        folder: Path | None,
        common: str,
        identities: Mapping[str, str],
        texts: Sequence[EncodedText],
        routing: str,
    ) -> None:
        self._folder = folder
        self._common = common
        self._identities = identities
        self._texts = texts
        self._routing = routing
        self.notices: list[str] = []

    def find(self, pairs: Iterable[Pair]) -> dict[Pair, Kept]:
        """Those of the pairs that are kept. What cannot be read as such is as if it were not."""
        found: dict[Pair, Kept] = {}
        for pair in pairs:
            if (kept := self._read(pair)) is not None:
                found[pair] = kept
        return found

    def keep(self, tables: Mapping[Pair, TokenTable]) -> None:
        """Keep tables that were computed; a disk that takes none is told, and costs nothing."""
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for pair, table in tables.items():
                if (path := self._path(pair)) is not None:
                    write_tokens(path, {self._name(pair, table): table})
            _forget(self._folder)
        except (OSError, So8tqcError) as error:
            self.notices.append(f"What was computed could not be kept for later calls: {error}.")

    def _read(self, pair: Pair) -> Kept | None:
        path = self._path(pair)
        if path is None or not path.is_file():
            return None
        try:
            made = path.stat().st_mtime
            ((name, table),) = read_tokens(path).items()
        except (So8tqcError, OSError, ValueError):
            return None
        if name != self._name(pair, table):
            return None
        if not self._is_of_these_texts(table):
            return None
        with suppress(OSError):
            os.utime(path, (datetime.now(tz=UTC).timestamp(), made))  # used now, made then
        return Kept(table, datetime.fromtimestamp(made, tz=UTC))

    def _path(self, pair: Pair) -> Path | None:
        if self._folder is None or not all(name in self._identities for name in pair):
            return None
        return self._folder / f"{self._key(pair)}.npz"

    def _key(self, pair: Pair) -> str:
        return sha256_json([self._common, *(self._identities[name] for name in pair)])

    def _name(self, pair: Pair, table: TokenTable) -> str:
        """How a table is called in its file: by its key, its marks and its values, all of them."""
        marks = None if table.tie is None else [self._routing, _array(table.tie)]
        columns = {name: _array(values) for name, values in table.columns.items()}
        indices = [_array(table.text), _array(table.position), table.vocab_size, table.texts]
        return sha256_json([self._key(pair), marks, columns, indices])

    def is_of_the_same(self, other: Evaluations) -> bool:
        """Whether both are of the same bytes: nothing has changed between them."""
        return (self._common, self._identities) == (other._common, other._identities)

    def _is_of_these_texts(self, table: TokenTable) -> bool:
        positions = [text.scored + text.start for text in self._texts]
        expected = np.concatenate(positions) if positions else np.empty(0)
        names = tuple(dict.fromkeys(text.id for text in self._texts))
        return table.texts == names and np.array_equal(table.position, expected)


def folder_of(config: QCConfig) -> Path | None:
    """Where evaluations are kept; None where nothing is.

    ``until`` decides while it runs how many texts are taken, and processes that work together
    would have to find the same: both compute everything.
    """
    if not config.evaluation_cache or config.until is not None or ranks.count() > 1:
        return None
    return config.evaluation_folder or default_folder()


def default_folder() -> Path | None:
    """In the user's cache; None where there can be none."""
    try:
        return user_cache() / "evaluations"
    except OSError:
        return None


def of_earlier_calls(
    planned: Planned, texts: Sequence[EncodedText], *, streams: bool, computes: str
) -> Evaluations:
    """What earlier calls computed of the same bytes.

    Args:
        planned: all that is compared.
        texts: on which.
        streams: whether models are run a layer at a time, whoever decided it.
        computes: the module that does: another version of what it leans on makes all tables anew.
    """
    config = planned.config
    folder = folder_of(config)
    if folder is None:
        return Evaluations(None, "", {}, texts, "")
    trained = _trained(planned)
    told = {name: sha256_json(parts) for name, parts in _parts(planned, trained).items()}
    files = bool(planned.readings) or is_gguf(config.reference)
    common = _common_key(config, texts, computes, streams=streams, files=files)
    routing = [bool(planned.readings), sorted(set(planned.dtypes.values())), trained]
    return Evaluations(folder, common, told, texts, sha256_json(routing))


def _base(planned: Planned) -> str:
    """Digest of what the rotations are applied to; "" where only a capture is there."""
    if planned.capture is not None and planned.config.base is None:
        return ""
    return model_digest(base_of(planned.config))


def _trained(planned: Planned) -> list[object] | None:
    """Base, rotations and adapters; None without any."""
    if not planned.is_trained:
        return None
    turned = None if planned.rotations is None else rotations_digest(planned.rotations)
    told = planned.config.trained_on
    path = None if told is None else Path(told)
    quantized = model_digest(path) if path is not None and path.is_dir() else None
    adapters = [adapter_fingerprint(directory) for directory in planned.adapters]
    return [_base(planned), turned, adapters, [None if told is None else str(told), quantized]]


def _parts(planned: Planned, trained: list[object] | None) -> dict[str, list[object]]:
    """Source → what it computes its logits from."""
    config, base = planned.config, _base(planned)
    found: dict[str, list[object]] = {
        BASE: ["model", base],
        ARITHMETIC: ["folded", trained, None],
        **{fold_name(dtype): ["folded", trained, dtype] for dtype in planned.dtypes.values()},
    }
    if planned.capture is None:
        found[REFERENCE] = ["reference", trained or model_digest(config.reference)]
    else:
        found[REFERENCE] = ["recorded", model_digest(config.reference)]
        found[GATED] = ["gated", trained, str(planned.capture.dtype)]
    for name, path in planned.names.items():
        digest = model_digest(path)
        reading = planned.readings.get(name)
        found[name] = ["model", digest]
        if reading is not None:
            found[name] = ["file", digest, planned.kv_types.get(name)]
            if reading.by_weights is not None:
                found[reading.by_weights] = ["weights", digest, model_digest(reading.directory)]
        if name in planned.floors:
            found[floor_name(name)] = ["honest", found[name], base, trained]
    return found


def _tokenizer_digest(config: QCConfig) -> str | None:
    """Of the directory whose vocabulary GGUF files are held against; None if there is none."""
    try:
        return directory_digest(input_directory(config))
    except InputError:
        return None


def _common_key(
    config: QCConfig,
    texts: Sequence[EncodedText],
    computes: str,
    *,
    streams: bool,
    files: bool,
) -> str:
    """Digest of what all pairs of a call share: texts, code, libraries, and how models are run.

    Args:
        config: of the ``qc``.
        texts: token ids, which of them are scored, and their pictures.
        computes: the module that does: another version of what it leans on makes all tables anew.
        streams: whether models are run a layer at a time.
        files: whether there are GGUF files.
    """
    closure = own_sources().closure(computes)
    return sha256_json(
        {
            "texts": [_text(text) for text in texts],
            "code": closure.digest,
            "libraries": versions(*closure.distributions),
            "dtype": config.compute_dtype,
            "devices": config.device_map,
            "machine": _machine(),
            "streams": streams,
            "libllama": _libllama() if files else None,
            "tokenizer": _tokenizer_digest(config),
        }
    )


def _machine() -> list[object]:
    """What rounds in its own way: the processor's kind, its vector instructions, the GPUs."""
    import torch

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return [
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        *(torch.cuda.get_device_name(gpu) for gpu in gpus),
    ]


def _libllama() -> list[object]:
    """The build that runs files, and the converter that says what their tensors were."""
    told: list[object] = []
    with suppress(MissingToolError):
        told.append(library_build().model_dump(mode="json"))
    with suppress(MissingToolError):
        folder = find_converter().script.parent
        scripts = sorted(folder.glob("*.py")) + sorted((folder / "conversion").rglob("*.py"))
        told.append({str(file.relative_to(folder)): _digest(file) for file in scripts})
    return told


def _text(text: EncodedText) -> list[object]:
    images = images_of(text.tokens)
    pictures = None
    if images is not None:
        inputs = {name: _array(value) for name, value in images.inputs.items()}
        pictures = [_array(images.mask), inputs, images.count]
    answers = None if text.answers is None else _array(text.answers)
    return [text.id, _array(text.tokens), text.first, text.start, answers, pictures]


def _array(values: Any) -> str:
    """Digest of an array or tensor: type, shape and values."""
    array = np.ascontiguousarray(np.asarray(values))
    told = f"{array.dtype.str} {array.shape} ".encode()
    return hashlib.sha256(told + array.tobytes()).hexdigest()


def rotations_digest(rotations: RotationSet) -> str:
    """Of the matrices themselves, where and on which side they act: however they were read."""
    blocks = {str(target): _array(rotations.column_blocks(target)) for target in rotations}
    return sha256_json([str(rotations.site), blocks])


def model_digest(path: Path) -> str:
    """Of a model file in all its parts, or of a model directory."""
    if path.is_dir():
        return directory_digest(path)
    return sha256_json([_digest(part) for part in parts_here(path)])


def directory_digest(path: Path) -> str:
    """Of the files in a directory by which a model and its tokenizer are what they are."""
    files = sorted(f for f in path.iterdir() if f.is_file() and f.suffix in _MODEL_FILES)
    return sha256_json({file.name: _digest(file) for file in files})


def _digest(path: Path) -> str:
    """SHA-256 of a file, read once in a process as long as the system says that it is the same."""
    told = path.stat()
    return _digest_of(path, told.st_ino, told.st_size, told.st_mtime_ns, told.st_ctime_ns)


@cache
def _digest_of(path: Path, *_told: int) -> str:
    return sha256_file(path)


def _forget(folder: Path) -> None:
    """Delete what was longest not used, until the rest is within :data:`MOST_BYTES`."""
    told = [(path, path.stat()) for path in folder.glob("*.npz")]
    total = sum(stat.st_size for _, stat in told)
    for path, stat in sorted(told, key=lambda item: item[1].st_atime):
        if total <= MOST_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= stat.st_size


def kept_notice(kept: Mapping[Pair, Kept], pairs: int) -> str:
    """That comparisons were not computed now, how many, and since when they are kept."""
    oldest = min(one.made for one in kept.values())
    return (
        f"{len(kept)} of {pairs} comparisons were computed by earlier calls, from the same bytes "
        f"and tokens, and kept (the oldest on {oldest:%Y-%m-%d at %H:%M} UTC); "
        "--no-evaluation-cache computes all of them again."
    )
