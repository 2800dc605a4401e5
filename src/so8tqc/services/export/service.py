"""Export: convert a model directory to GGUF, compare every tensor with its source, run the file."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from so8tqc.checkpoints.provenance import Provenance, read_provenance
from so8tqc.checkpoints.safetensors_index import Checkpoint, open_checkpoint
from so8tqc.checkpoints.skeleton import skeleton
from so8tqc.closure import versions_of
from so8tqc.config import ExportConfig, ExportType
from so8tqc.disk.atomic import atomic_file, remove_leftovers, require_space, temporary_file
from so8tqc.disk.digests import file_ref
from so8tqc.disk.locks import claim_output, exclusive
from so8tqc.errors import MissingToolError, ModelError, ToolError
from so8tqc.gguf.conversion import Conversion, read_conversion
from so8tqc.gguf.file import GGUFFile, open_gguf
from so8tqc.gguf.mmproj import mmproj_beside
from so8tqc.gguf.rewrite import rewrite
from so8tqc.llama.converter import convert
from so8tqc.llama.generation_keys import mended
from so8tqc.llama.vendor import Converter, fetch_converter, find_converter
from so8tqc.progress import SILENT, Progress
from so8tqc.record_kinds.export import ExportMetrics
from so8tqc.records import Check, FileRef, Record, Stopwatch, overall
from so8tqc.services.export.comparison import TensorComparison
from so8tqc.services.export.kept_tensors import (
    Kept,
    choose,
    float32_values,
    kept_checks,
    kept_notices,
    refuse_unbaked,
)
from so8tqc.services.export.logits import logits_checks, run_model
from so8tqc.services.export.proof import compare_tensors, proof_checks
from so8tqc.services.export.provenance import provenance_keys
from so8tqc.services.export.traced import compare_traced
from so8tqc.services.export.vision import (
    NoVisionFileError,
    Vision,
    has_vision,
    left_out,
    mmproj_metrics,
    not_written,
    vision_checks,
    write_vision,
)
from so8tqc.sources.converted.history import NO_MTP, places_of, until_understood
from so8tqc.sources.inputs.hub import with_local_paths

_BYTES_PER_WEIGHT: dict[ExportType, float] = {
    "f32": 4,
    "f16": 2,
    "bf16": 2,
    "auto": 2,
    "q8_0": 34 / 32,
}


@exclusive(claim_output)
def export(config: ExportConfig, progress: Progress = SILENT) -> Record:
    """Convert a model directory with llama.cpp's converter and prove the result.

    Every tensor is compared with its source, and libllama runs the file beside transformers. The
    provenance of a baked directory goes into the file's ``so8t.*`` keys.

    Record metrics: :class:`so8tqc.record_kinds.export.ExportMetrics`.

    Raises:
        ConfigError: ``keep_f32`` names nothing.
        ModelError: the directory is no model, or what the converter wrote is no GGUF.
        ToolError: no converter, it failed, or the disk has no room.
    """
    watch = Stopwatch()
    config = with_local_paths(config, progress)
    ready = _prepare(config, progress)
    skeleton(
        ready.checkpoint
    )  # transformers puts its modules in place when first asked: one thread
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        running = pool.submit(run_model, ready.checkpoint)  # while the converter works
        with atomic_file(config.out) as temporary:
            written = _write(config, ready, temporary, progress)
            kept, conversion = written.kept, written.conversion
            read_back = open_gguf(temporary)  # what cannot be read back must not appear
            _require_room_in_f16(read_back, conversion, ready.checkpoint)
        gguf = replace(read_back, path=config.out)  # the same bytes under their final name
        if conversion is None:
            comparison = compare_tensors(ready.checkpoint, gguf, progress)
        else:
            comparison = compare_traced(ready.checkpoint, gguf, conversion, progress)
        sight = _write_vision(config, ready, progress)
        seen = _vision_checks(sight, ready, gguf, comparison, progress)
        logits = logits_checks(running.result(), gguf, progress)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    checks = [*proof_checks(comparison), *kept_checks(kept, gguf), *logits, *seen]
    return Record(
        kind="export",
        verdict=overall(checks),
        checks=tuple(checks),
        metrics=ExportMetrics(
            architecture=gguf.architecture,
            file_type=gguf.file_type,
            types=gguf.types,
            tensors=len(gguf.tensors),
            bytes=config.out.stat().st_size,
            bits_per_weight=gguf.bits_per_weight,
            rearranged=comparison.arrangements,
            baked=ready.provenance is not None,
            kept=sorted(kept),
            converter=ready.converter.revision,
            mmproj=mmproj_metrics(sight) if isinstance(sight, Vision) else None,
        ).as_json(),
        notices=(
            *written.notices,
            *kept_notices(kept, ready.checkpoint),
            *([sight.detail] if seen and isinstance(sight, Check) else []),
        ),
        inputs={"model": file_ref(config.model)},
        outputs=_outputs(config, sight),
        config=config.model_dump(mode="json"),
        versions=versions_of(__name__),
        run=watch.info(),
    )


def _require_room_in_f16(
    gguf: GGUFFile, conversion: Conversion | None, checkpoint: Checkpoint
) -> None:
    """Refuse a file in which F16 had no room for a weight.

    Raises:
        ModelError: a weight beyond 65,504, which F16 stores as infinity.
    """
    for name, tensor in gguf.tensors.items():
        if tensor.type == "F16" and not np.isfinite(tensor.data).all():
            sources = conversion.sources.get(name, ()) if conversion else ()
            raise ModelError(
                f"{name} ({', '.join(sources[:3]) or 'of an unknown source'}) has weights beyond "
                "65,504, which F16 cannot hold, or that are no numbers",
                where=str(checkpoint.directory),
                remedy="Export with --type bf16 (or f32), which have room for them.",
            )


def write_gguf(config: ExportConfig, progress: Progress = SILENT) -> None:
    """The file that :func:`export` writes, without the proof.

    Raises:
        ConfigError, ModelError, ToolError: as :func:`export`.
    """
    ready = _prepare(config, progress)
    with atomic_file(config.out) as temporary:
        _write(config, ready, temporary, progress)
    _write_vision(config, ready, progress)


def _write_vision(config: ExportConfig, ready: _Prepared, progress: Progress) -> Vision | Check:
    """The vision tower's file beside the text's; of a model that sees, why there is none.

    A model that does not see has a check, too, which nobody asks for.
    """
    checkpoint, out = ready.checkpoint, mmproj_beside(config.out)
    if not has_vision(checkpoint):
        return left_out("The model takes no pictures.")
    if config.text_only:
        return left_out("Text only, as asked: the vision tower is left out.")
    try:
        with atomic_file(out) as temporary:
            log = config.out.with_name(out.name + ".log")
            vision = write_vision(
                checkpoint,
                ready.converter,
                temporary,
                config.type,
                config.converter_args,
                log,
                progress,
            )
            _require_room_in_f16(vision.mmproj.gguf, vision.conversion, checkpoint)
    except NoVisionFileError as reason:
        return left_out(f"The vision tower was not written: {reason}.")
    except ToolError as error:
        return not_written(str(error))
    gguf = replace(vision.mmproj.gguf, path=out)
    return replace(vision, mmproj=replace(vision.mmproj, gguf=gguf))


def _vision_checks(
    sight: Vision | Check,
    ready: _Prepared,
    text: GGUFFile,
    of_text: TensorComparison,
    progress: Progress,
) -> list[Check]:
    if isinstance(sight, Vision):
        return vision_checks(ready.checkpoint, sight, text, of_text, progress)
    return [sight] if has_vision(ready.checkpoint) else []


def _outputs(config: ExportConfig, sight: Vision | Check) -> dict[str, FileRef]:
    outputs = {"gguf": file_ref(config.out)}
    if isinstance(sight, Vision):
        outputs["mmproj"] = file_ref(sight.mmproj.gguf.path)
    return outputs


@dataclass(frozen=True)
class _Prepared:
    """An export that has passed every check that needs no writing."""

    checkpoint: Checkpoint
    converter: Converter
    provenance: Provenance | None

    def rewritten(self, config: ExportConfig) -> bool:
        """Whether the converter's file is not the last word."""
        return self.provenance is not None or bool(config.keep_f32)


def _prepare(config: ExportConfig, progress: Progress) -> _Prepared:
    checkpoint = open_checkpoint(config.model)
    converter = _converter(config, progress)
    ready = _Prepared(checkpoint, converter, read_provenance(config.model))
    refuse_unbaked(config.keep_f32, checkpoint, ready.provenance is not None)
    need = _bytes_needed(checkpoint, config.type) * (2 if ready.rewritten(config) else 1)
    require_space(config.out.parent, need, "the export needs about {}")
    remove_leftovers(config.out.parent)
    return ready


def _converter(config: ExportConfig, progress: Progress) -> Converter:
    """The converter; where there is none and that was allowed, it is fetched."""
    try:
        return find_converter(config.llama_cpp)
    except MissingToolError:
        if config.vendor != "auto":
            raise
        return fetch_converter(progress)


class _Converted(NamedTuple):
    """The history of every tensor, where the converter told it, and what was given to it."""

    conversion: Conversion | None
    notices: list[str]


class _Written(NamedTuple):
    """What was kept unrounded, and the history of every tensor, where the converter told it."""

    kept: Kept
    conversion: Conversion | None
    notices: list[str]


def _convert(
    config: ExportConfig, ready: _Prepared, destination: Path, progress: Progress
) -> _Converted:
    """Convert; what the converter misses and the model says is given to it, and it tries again.

    Raises:
        ToolError: it failed for another reason; the message is its own.
    """
    log = config.out.with_name(config.out.name + ".log")
    with TemporaryDirectory(prefix="so8tqc-") as scratch:
        trace = Path(scratch) / "trace.json"
        told = until_understood(
            lambda told: convert(
                ready.converter,
                config.model,
                destination,
                config.type,
                log,
                progress,
                trace=trace,
                arguments=told.arguments,
                keys=told.keys,
            ),
            ready.checkpoint,
            config.converter_args,
        )
        conversion = read_conversion(trace, places_of(ready.checkpoint))
    notices = [
        f"The converter was given {key} = {value!r}, which the config says in other words."
        for key, value in told.keys.items()
    ]
    notices += () if (generation := mended(config.model)) is None else generation.notices
    if len(told.arguments) > len(config.converter_args):
        notices.append(f"The converter was given {NO_MTP}: the model has no such layers.")
    return _Converted(conversion, notices)


def _write(
    config: ExportConfig, ready: _Prepared, destination: Path, progress: Progress
) -> _Written:
    """Convert; set the provenance and put unrounded tensors back in one rewrite."""
    if not ready.rewritten(config):
        done = _convert(config, ready, destination, progress)
        return _Written({}, done.conversion, done.notices)
    with temporary_file(config.out) as converted:
        done = _convert(config, ready, converted, progress)
        conversion = done.conversion
        gguf = open_gguf(converted)
        kept = choose(config.keep_f32, ready.checkpoint, ready.provenance, gguf, conversion)
        require_space(destination.parent, _bytes_rewritten(gguf, kept), "rewriting needs {}")
        keys = {} if ready.provenance is None else provenance_keys(ready.provenance)
        values = float32_values(kept, ready.checkpoint, gguf, conversion)
        rewrite(converted, destination, keys, values, progress)
    return _Written(kept, conversion, done.notices)


def _bytes_needed(checkpoint: Checkpoint, type_: ExportType) -> float:
    weights = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
    return weights * _BYTES_PER_WEIGHT[type_]


def _bytes_rewritten(gguf: GGUFFile, kept: Kept) -> int:
    wider = sum(4 * gguf.tensors[name].elements - gguf.tensors[name].bytes for name in kept)
    return gguf.path.stat().st_size + wider
