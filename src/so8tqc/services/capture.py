"""Capture: record a model's logits as a reference, and what a capture allows to check."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from so8tqc.artifacts import file_ref, remove_leftovers, require_space, short_name
from so8tqc.config import CaptureConfig
from so8tqc.errors import ConfigError, ModelError
from so8tqc.llama.gguf_file import is_gguf
from so8tqc.locks import claim_output, exclusive
from so8tqc.metrics.divergence import TokenTable, summarise
from so8tqc.progress import SILENT, Progress
from so8tqc.records import Check, FileRef, Record, Stopwatch, Verdict, judge, skipped, versions
from so8tqc.rotations.rotation_set import RotationSet
from so8tqc.services.judging import EFFECT_FACTOR, SMALLEST_EFFECT
from so8tqc.services.reference import reference_rotations
from so8tqc.sources.capture import (
    SOURCE_KEY,
    VOCABULARY_KEY,
    Capture,
    is_capture,
    vocabulary_digest,
)
from so8tqc.sources.capture_writer import capture_bytes, write_capture
from so8tqc.sources.gated import GatedSource
from so8tqc.sources.gguf import GGUFSource
from so8tqc.sources.hf import HFModel, HFSource
from so8tqc.sources.hub import with_local_paths
from so8tqc.sources.protocol import LogitSource
from so8tqc.sources.texts import encode, load_texts, load_tokenizer

_STORED = {"float32": "F32", "float16": "F16"}


@exclusive(claim_output)
def capture(config: CaptureConfig, progress: Progress = SILENT) -> Record:
    """Run a model over texts and record its logits: a reference for ``qc`` that needs no model.

    Record metrics: ``texts``, ``tokens``, ``vocab_size``, ``dtype``, ``bytes``, and ``rounding``
    (largest |Δlogit| between what was computed and what is stored).

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
    rotations = reference_rotations(config.model, config.rotations, config.rotation_options)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    texts = encode(load_texts(config.data), tokenizer, config.max_tokens)
    inputs = _inputs(config)
    source = _source(config, rotations)
    stored = _STORED[config.dtype]
    try:
        need = capture_bytes(texts, source.vocab_size, stored)
        require_space(config.out.parent, need, "the capture needs {}")
        remove_leftovers(config.out.parent)
        metadata = {
            VOCABULARY_KEY: vocabulary_digest(tokenizer),
            SOURCE_KEY: json.dumps({k: [Path(v.path).name, v.sha256] for k, v in inputs.items()}),
        }
        rounding = write_capture(config.out, source, texts, stored, metadata, progress)
    finally:
        source.close()
    return Record(
        kind="capture",
        verdict=Verdict.PASS,
        metrics={
            "texts": len(texts),
            "tokens": sum(text.tokens.size for text in texts),
            "vocab_size": source.vocab_size,
            "dtype": config.dtype,
            "bytes": config.out.stat().st_size,
            "rounding": rounding,
        },
        notices=rotations.notices if rotations else (),
        inputs=inputs,
        outputs={"capture": file_ref(config.out)},
        config=config.model_dump(mode="json"),
        versions=versions("torch", "transformers", "llama-cpp-python", "safetensors"),
        run=watch.info(),
    )


def vocabulary_checks(recorded: Capture, candidates: Mapping[str, Path]) -> list[Check]:
    """``structure.vocabulary``: does a candidate's tokenizer give the recorded tokens their ids?

    GGUF candidates are left out, as their tokenizer is of libllama's own making.
    """
    return [
        _vocabulary_check(recorded, name, path)
        for name, path in candidates.items()
        if not is_gguf(path)
    ]


def _vocabulary_check(recorded: Capture, name: str, path: Path) -> Check:
    check_id = "structure.vocabulary"
    if not recorded.vocabulary_sha256:
        return skipped(check_id, f"The capture has no {VOCABULARY_KEY}.", subject=name)
    try:
        digest = vocabulary_digest(load_tokenizer(path))
    except ModelError as error:
        return skipped(check_id, str(error), subject=name)
    return judge(
        check_id,
        float(digest != recorded.vocabulary_sha256),
        0.0,
        comparison="==",
        subject=name,
        detail="Whether the tokenizer's vocabulary differs from the recorded one.",
    )


def capture_metrics(recorded: Capture, to_gated: TokenTable | None) -> dict[str, object]:
    """What was recorded: ``texts``, ``tokens``, ``dtype``, ``source``, ``gated``.

    Args:
        recorded: the reference.
        to_gated: base plus rotations against it, where they were given.
    """
    metrics: dict[str, object] = {
        "texts": len(recorded.texts),
        "tokens": recorded.tokens,
        "dtype": str(recorded.dtype).removeprefix("torch."),
        "source": recorded.source,
    }
    return metrics if to_gated is None else {**metrics, "gated": summarise(to_gated)}


def capture_notices(to_gated: TokenTable | None, floor: TokenTable | None) -> list[str]:
    """What the user of a capture should know: no floor, or other rotations than recorded."""
    if to_gated is None:
        return [
            "The reference is a capture, so that no noise floor was measured: targets are the "
            "limits. Give --base and --rotations to have it measured, and the files checked."
        ]
    distance = float(to_gated.columns["kl"].mean())
    noise = 0.0 if floor is None else float(floor.columns["kl"].mean())
    if distance <= max(SMALLEST_EFFECT, EFFECT_FACTOR * noise):
        return []
    return [
        f"Base and rotations, as read here, are {distance:.3g} nats from the capture: what was "
        "recorded had another convention, parametrization, site or weights, or computed in 16 bits."
    ]


def _source(config: CaptureConfig, rotations: RotationSet | None) -> LogitSource:
    name = short_name(config.model)
    if is_gguf(config.model):
        return GGUFSource(config.model, name, threads=config.threads)
    model = HFModel.load(config.model)
    return GatedSource(model, rotations, name) if rotations else HFSource(model, name)


def _inputs(config: CaptureConfig) -> dict[str, FileRef]:
    inputs = {"model": file_ref(config.model)}
    if config.rotations is not None:
        inputs["rotations"] = file_ref(config.rotations)
    return inputs
