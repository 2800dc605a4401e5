"""Capture: record a model's logits as a reference, and what a capture allows to check."""

from __future__ import annotations

import json
from pathlib import Path

from so8tqc.closure import versions_of
from so8tqc.config import CaptureConfig
from so8tqc.disk.atomic import remove_leftovers, require_space
from so8tqc.disk.digests import file_ref, short_name
from so8tqc.disk.locks import claim_output, exclusive
from so8tqc.errors import ConfigError
from so8tqc.gguf.file import is_gguf
from so8tqc.progress import SILENT, Progress
from so8tqc.record_kinds.capture import CaptureMetrics
from so8tqc.records import FileRef, Record, Stopwatch, Verdict
from so8tqc.rotations.rotation_set import RotationSet
from so8tqc.services.trained_base import TrainedBase, trained_base
from so8tqc.sources.capture import (
    SOURCE_KEY,
    VOCABULARY_KEY,
    is_capture,
    vocabulary_digest,
)
from so8tqc.sources.capture_writer import capture_bytes, write_capture
from so8tqc.sources.embedding import with_embedded
from so8tqc.sources.gguf import GGUFSource
from so8tqc.sources.hf import HFModel
from so8tqc.sources.inputs.hub import with_local_paths
from so8tqc.sources.inputs.prepared import prepare
from so8tqc.sources.inputs.texts import load_tokenizer
from so8tqc.sources.layerwise.choice import ModelLoader, gated_source, plain_source
from so8tqc.sources.protocol import LogitSource
from so8tqc.sources.unmerged import load_unmerged, unmerged_source

_STORED = {"float32": "F32", "float16": "F16"}


@exclusive(claim_output)
def capture(config: CaptureConfig, progress: Progress = SILENT) -> Record:
    """Run a model over texts and record its logits: a reference for ``qc`` that needs no model.

    Record metrics: :class:`so8tqc.record_kinds.capture.CaptureMetrics`.

    Raises:
        ConfigError: the output's name does not end in .safetensors.
        InputError: model, rotations or data are unusable; a logit is not finite or too large for
            the dtype.
        ToolError: no room on the disk, or a GGUF is given and libllama is missing.
    """
    watch = Stopwatch()
    config = with_local_paths(config, progress)
    if not is_capture(config.out):
        raise ConfigError("a capture's name ends in .safetensors", where=str(config.out))
    near = config.out.with_name(f"{config.out.name}.trained")
    with trained_base(config.model, config.rotations, config.rotation_options, near) as trained:
        return _capture(config, trained, watch, progress)


def _capture(
    config: CaptureConfig, trained: TrainedBase, watch: Stopwatch, progress: Progress
) -> Record:
    rotations = trained.rotation_set()
    tokenizer = load_tokenizer(_directory(config, trained))
    texts, notices = prepare(
        config.data, tokenizer, config.max_tokens, images=config.images, chat=config.chat
    )
    inputs = _inputs(config)
    loader = _loader(config, trained)
    source = loader.built(
        lambda: _source(config, trained, rotations, loader), lambda made: (made,), texts, progress
    )
    stored = _STORED[config.dtype]
    try:
        need = capture_bytes(texts, source.vocab_size, stored)
        require_space(config.out.parent, need, "the capture needs {}")
        remove_leftovers(config.out.parent)
        metadata = {
            VOCABULARY_KEY: vocabulary_digest(tokenizer),
            SOURCE_KEY: json.dumps({k: [Path(v.path).name, v.sha256] for k, v in inputs.items()}),
        }
        texts = with_embedded(texts, [source], lambda: HFModel.load(_directory(config, trained)))
        rounding = write_capture(config.out, source, texts, stored, metadata, progress)
    finally:
        source.close()
    loader.finished()
    return Record(
        kind="capture",
        verdict=Verdict.PASS,
        metrics=CaptureMetrics(
            texts=len(texts),
            tokens=sum(text.tokens.size for text in texts),
            vocab_size=source.vocab_size,
            dtype=config.dtype,
            bytes=config.out.stat().st_size,
            rounding=rounding,
        ).as_json(),
        notices=(*notices, *(rotations.notices if rotations else ()), *loader.notices),
        inputs=inputs,
        outputs={"capture": file_ref(config.out)},
        config=config.model_dump(mode="json"),
        versions=versions_of(__name__),
        run=watch.info(),
    )


def _loader(config: CaptureConfig, trained: TrainedBase) -> ModelLoader:
    resident = bool(trained.adapters) or is_gguf(config.model)
    loader = ModelLoader(
        config.out.with_name(f".{config.out.name}.layers"),
        stream=False if resident else config.stream,
        directories=() if resident else (trained.directory,),
    )
    if config.stream and trained.adapters:
        loader.notices.append(
            "Adapters are run by PEFT, which needs the whole model: it is held in memory."
        )
    return loader


def _directory(config: CaptureConfig, trained: TrainedBase) -> Path:
    """Whose tokenizer and processor make input of the texts."""
    return config.tokenizer or trained.directory


def _source(
    config: CaptureConfig,
    trained: TrainedBase,
    rotations: RotationSet | None,
    loader: ModelLoader,
) -> LogitSource:
    name = short_name(config.model)
    if is_gguf(config.model):
        return GGUFSource(config.model, name, threads=config.threads)
    if trained.adapters:
        return unmerged_source(load_unmerged(trained.directory, trained.adapters), rotations, name)
    model = loader.load(trained.directory)
    return gated_source(model, rotations, name) if rotations else plain_source(model, name)


def _inputs(config: CaptureConfig) -> dict[str, FileRef]:
    inputs = {"model": file_ref(config.model)}
    if config.rotations is not None:
        inputs["rotations"] = file_ref(config.rotations)
    for i, path in enumerate(config.rotation_options.adapters):
        inputs[f"adapter_{i + 1}"] = file_ref(path)
    return inputs
