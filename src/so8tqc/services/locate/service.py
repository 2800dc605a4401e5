"""Where two models part: config in, record out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from so8tqc.closure import versions_of
from so8tqc.config import LocateConfig
from so8tqc.disk.digests import file_ref
from so8tqc.disk.locks import claim_folder, exclusive
from so8tqc.errors import ConfigError, InputError, ToolError
from so8tqc.gguf.file import is_gguf
from so8tqc.llama.values import can_watch
from so8tqc.progress import SILENT, Progress
from so8tqc.record_kinds.locate import LocateMetrics
from so8tqc.records import Check, FileRef, Record, Stopwatch, judge, overall, skipped
from so8tqc.rotations.layers import parse_layers
from so8tqc.services.locate.judge import (
    Rows,
    diagnose_operations,
    diagnose_runtime,
    locate_checks,
    runtime_checks,
)
from so8tqc.services.locate.runtime import RuntimeRows
from so8tqc.services.locate.sides import Sides, open_sides
from so8tqc.services.locate.vocabulary import require_same_vocabulary
from so8tqc.services.locate.walk import Stage, Walk
from so8tqc.services.qc.compatibility import require_same_architecture
from so8tqc.services.trained_base import TrainedBase, trained_base
from so8tqc.sources.capture import is_capture
from so8tqc.sources.inputs.hub import with_local_paths
from so8tqc.sources.inputs.prepared import Prepared, prepare
from so8tqc.sources.inputs.texts import data_paths, load_tokenizer
from so8tqc.sources.protocol import TokenIds


@exclusive(claim_folder)
def locate(config: LocateConfig, progress: Progress = SILENT) -> Record:
    """Run reference and candidate on the same tokens, a layer at a time, and say where they part.

    Record metrics: :class:`so8tqc.record_kinds.locate.LocateMetrics`.

    Raises:
        InputError: models, rotations or data are unusable or do not belong together.
        MissingToolError: a GGUF is given and llama.cpp's converter is missing.
        ConfigError: layers that the model does not have.
    """
    watch = Stopwatch()
    config = with_local_paths(config, progress)
    _require_directory(config)
    require_same_architecture(config.reference, [config.candidate])
    near = config.out / "trained"
    with trained_base(config.reference, config.rotations, config.rotation_options, near) as trained:
        prepared = _texts(config, trained)
        sides = open_sides(trained, config.candidate, config.compute_dtype)
        rows = _rows(config, sides)
        tokens = [text.tokens for text in prepared.texts]
        seen = _runtime(config, sides, tokens)

        def look(stage: Stage) -> None:
            rows.look(stage)
            if seen.rows is not None:
                seen.rows.look(stage)

        runtime = None if seen.rows is None else seen.rows.runtime
        Walk(sides, tokens, runtime).run(look, progress)
    values = [] if seen.rows is None else seen.rows.rows()
    checks = locate_checks(rows, sides.unseen) + list(seen.checks)
    if seen.rows is not None:
        checks += runtime_checks(values, seen.rows.unseen)
    return Record(
        kind="locate",
        verdict=overall(checks),
        checks=tuple(checks),
        metrics=LocateMetrics(
            layers=rows.layers,
            operations=rows.operations,
            types=sides.types,
            texts=len(prepared.texts),
            tokens=sum(text.tokens.size for text in prepared.texts),
            keys=[variant.words for variant in sides.variants.values()],
            runtime=None if seen.rows is None else values,
        ).as_json(),
        diagnosis=(*diagnose_operations(rows.operations), *diagnose_runtime(values)),
        notices=(*prepared.notices, *sides.notices),
        inputs=_inputs(config),
        config=config.model_dump(mode="json"),
        versions=versions_of(__name__),
        run=watch.info(),
    )


def _require_directory(config: LocateConfig) -> None:
    """See that the reference is a model whose operations can be run one by one.

    Raises:
        InputError: a GGUF file or a capture.
    """
    if is_gguf(config.reference) or is_capture(config.reference):
        raise InputError(
            "the reference's operations are run one by one, by transformers: it must be a model "
            "directory",
            where=str(config.reference),
            remedy="Give the directory that the candidate was made from.",
        )
    if is_capture(config.candidate):
        raise InputError("recorded logits have no layers", where=str(config.candidate))


def _texts(config: LocateConfig, trained: TrainedBase) -> Prepared:
    directory = config.tokenizer or trained.directory
    tokenizer = load_tokenizer(directory)
    require_same_vocabulary(config.candidate, tokenizer, directory)
    prepared = prepare(config.data, tokenizer, config.max_tokens)
    return prepared._replace(texts=prepared.texts[: config.texts])


class _Seen(NamedTuple):
    """libllama's values, or what is to be said without them."""

    rows: RuntimeRows | None
    checks: tuple[Check, ...] = ()


def _runtime(config: LocateConfig, sides: Sides, tokens: Sequence[TokenIds]) -> _Seen:
    """Run a GGUF candidate by libllama."""
    if sides.file is None or not config.runtime:
        return _Seen(None)
    if not can_watch():
        reason = "llama-cpp-python is not installed: libllama's own values were not looked at."
        return _Seen(None, (skipped("locate.runtime", reason),))
    try:
        return _Seen(RuntimeRows(sides, config.candidate, tokens))
    except ToolError as error:
        detail = f"libllama does not run the file: {error.what}."
        return _Seen(None, (judge("locate.runtime", math.inf, 0, detail=detail),))


def _rows(config: LocateConfig, sides: Sides) -> Rows:
    import torch

    count = len(sides.candidate.model.layers)
    only = None
    if config.only_layers is not None:
        only = {i for part in parse_layers(config.only_layers) for i in part}
        if max(only) >= count:
            raise ConfigError(
                f"there is no layer {max(only)}: the model has {count}", where="only_layers"
            )
    return Rows(sides, torch.finfo(getattr(torch, config.compute_dtype)).eps, only)


def _inputs(config: LocateConfig) -> dict[str, FileRef]:
    inputs = {"reference": file_ref(config.reference), "candidate": file_ref(config.candidate)}
    if config.rotations is not None:
        inputs["rotations"] = file_ref(config.rotations)
    for i, path in enumerate(config.rotation_options.adapters):
        inputs[f"adapter_{i + 1}"] = file_ref(path)
    return inputs | {f"data: {path.name}": file_ref(path) for path in data_paths(config.data)}
