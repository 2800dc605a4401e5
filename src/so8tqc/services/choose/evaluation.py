"""Many GGUF files against one reference, a few in each pass over the texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil

from so8tqc.config import ChooseConfig, QCConfig
from so8tqc.disk.parts import bytes_of
from so8tqc.metrics.divergence import TokenTable
from so8tqc.progress import Progress
from so8tqc.services.qc.models import (
    load_model,
    opened_reference,
    prepared_of,
    reference_sources,
)
from so8tqc.services.qc.planned import BASE, REFERENCE, input_directory
from so8tqc.sources.capture import capture_if_one
from so8tqc.sources.compare import compare
from so8tqc.sources.embedding import with_embedded
from so8tqc.sources.gguf import open_together
from so8tqc.sources.protocol import LogitSource, TokenIds

_MEMORY_SHARE = 0.5
_CONTEXT_BYTES = 300 << 20
"""Memory of one more model in a process of its own: interpreter, context and logits."""


class Tables:
    """What an evaluation yields: each file against the reference, and the base against each file.

    Attributes:
        to_reference: file → table.
        to_base: file → table; empty without rotations.
        effect: base against reference, None without rotations.
    """

    def __init__(self) -> None:
        self.to_reference: dict[str, TokenTable] = {}
        self.to_base: dict[str, TokenTable] = {}
        self.effect: TokenTable | None = None


class Evaluation:
    """The reference and the texts of one run, loaded once.

    Args:
        config: reference, rotations, texts.

    Raises:
        InputError: models, rotations or texts are unusable or do not belong together.
        ConfigError: a base without a capture and rotations.
    """

    def __init__(self, config: ChooseConfig) -> None:
        self._threads = config.threads
        reference = config.reference or config.gguf
        capture = capture_if_one(reference)
        qc = _as_qc(config, reference)
        with ExitStack() as stack:
            opened = stack.enter_context(opened_reference(qc, capture))
            self.texts, self.notices = prepared_of(opened.config, capture)
            self._reference: list[LogitSource] = reference_sources(
                opened.config, capture, opened.rotations, opened.adapters
            )
            self.texts = with_embedded(
                self.texts,
                self._reference,
                lambda: load_model(opened.config, input_directory(opened.config)),
                files_follow=True,
            )
            self.has_base = len(self._reference) > 1
            self._open = stack.pop_all()

    @property
    def sample(self) -> TokenIds:
        """The tokens of the longest text."""
        return max((text.tokens for text in self.texts), key=len)

    def tables(
        self, files: Mapping[str, Path], progress: Progress, *, against_base: bool
    ) -> Tables:
        """Evaluate files, as many at a time as fit in memory.

        Args:
            files: name → GGUF file.
            progress: told about tokens.
            against_base: whether the files are also compared with the base, if there is one.
        """
        with_base = against_base and self.has_base
        kept = self._reference if with_base else self._reference[:1]
        found = Tables()
        for batch in _batches(files):
            description = (
                f"comparing {', '.join(batch)}"
                if len(batch) < 3
                else (f"comparing {len(batch)} files")
            )
            models = open_together({n: files[n] for n in batch}, threads=self._threads)
            try:
                pairs = [(REFERENCE, name) for name in batch]
                if with_base:
                    pairs += [(BASE, REFERENCE), *((BASE, name) for name in batch)]
                tables = compare([*kept, *models], pairs, self.texts, progress, description)
            finally:
                for model in models:
                    model.close()
            found.to_reference |= {name: tables[(REFERENCE, name)] for name in batch}
            if with_base:
                found.to_base |= {name: tables[(BASE, name)] for name in batch}
                found.effect = tables[(BASE, REFERENCE)]
        return found

    def close(self) -> None:
        """Release the reference."""
        for source in self._reference:
            source.close()
        self._open.close()


def _as_qc(config: ChooseConfig, reference: Path) -> QCConfig:
    fields = set(QCConfig.model_fields) & config.model_fields_set
    shared = {name: getattr(config, name) for name in fields}
    shared |= {"reference": reference, "candidates": (config.gguf,), "out": config.out}
    return QCConfig(**shared)


def _batches(files: Mapping[str, Path]) -> Iterator[Sequence[str]]:
    """Names, in groups whose models fit into memory together (at least one in each)."""
    room = psutil.virtual_memory().available * _MEMORY_SHARE
    batch: list[str] = []
    used = 0.0
    for name, path in files.items():
        need = bytes_of(path) + _CONTEXT_BYTES
        if batch and used + need > room:
            yield batch
            batch, used = [], 0.0
        batch.append(name)
        used += need
    if batch:
        yield batch
