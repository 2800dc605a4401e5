"""Baking adapters, and gates in front of them: what ``services.bake`` does for gates alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from so8tqc.adapters.changed import AdapterPatch
from so8tqc.adapters.files import adapter_fingerprint
from so8tqc.adapters.plan import AdapterPlan
from so8tqc.checkpoints.baking import hash_tensors
from so8tqc.checkpoints.copy import copy_companions
from so8tqc.checkpoints.patch import patch_files
from so8tqc.checkpoints.plan import CHUNK_ELEMENTS, MEMORY_ARRAYS
from so8tqc.checkpoints.provenance import (
    BakedAdapter,
    BakedTensor,
    Provenance,
    baked_ref,
    write_provenance,
)
from so8tqc.checkpoints.safetensors_index import (
    ITEM_BYTES,
    Checkpoint,
    TensorEntry,
    open_checkpoint,
)
from so8tqc.closure import versions_of
from so8tqc.config import BakeConfig
from so8tqc.disk.atomic import atomic_directory, remove_leftovers, require_space
from so8tqc.disk.digests import file_ref, hub_source, sha256_json
from so8tqc.errors import RotationError
from so8tqc.progress import Progress
from so8tqc.record_kinds.bake import AppliedAdapter, BakeMetrics, FoldedLayer
from so8tqc.records import Check, FileRef, Record, Stopwatch, overall, versions
from so8tqc.services.trained_base import TrainedBase
from so8tqc.services.weights.adapters import (
    AdapterAlgebra,
    adapter_algebra,
    adapter_checks,
)
from so8tqc.services.weights.structure import algebra_checks, rotation_checks, structure_checks
from so8tqc.threads import WORKERS

_VERSIONS = ("torch", "safetensors", "numpy")


@dataclass(frozen=True)
class PreparedAdapters:
    """An adapter bake that has passed every check that needs no writing."""

    checkpoint: Checkpoint
    plan: AdapterPlan
    size: int


def prepare_adapters(config: BakeConfig, found: TrainedBase) -> PreparedAdapters:
    """Open everything and plan.

    Raises:
        InputError: base, adapters or gates are malformed or do not fit each other.
    """
    plan = found.adapter_plan(config.baked_dtype)
    if plan is None:
        raise RotationError("no adapters", where=str(config.base))
    checkpoint = plan.checkpoint
    grown = sum(
        (c.entry.end - c.entry.start) // ITEM_BYTES[c.entry.dtype] * ITEM_BYTES[c.dtype]
        - (c.entry.end - c.entry.start)
        for c in plan.changed
    )
    return PreparedAdapters(checkpoint, plan, checkpoint.bytes + grown)


def adapter_inputs(config: BakeConfig) -> dict[str, FileRef]:
    """What was given as rotations, and as adapters beside them."""
    given = {} if config.rotations is None else {"rotations": file_ref(config.rotations)}
    beside = {f"adapter_{i}": file_ref(path) for i, path in enumerate(config.adapters, start=1)}
    return given | beside


def bake_adapters(
    config: BakeConfig,
    ready: PreparedAdapters,
    found: TrainedBase,
    watch: Stopwatch,
    progress: Progress,
) -> Record:
    """Write W' of every changed tensor; see ``services.bake.bake``.

    Record metrics: ``layers`` (one row per changed tensor: effect, distance from the exact value in
    ulps, sha256 before and after), ``adapters`` (method, modules), ``bytes_written``.
    """
    require_space(config.out.parent, ready.size, "the baked model needs {}")
    remove_leftovers(config.out.parent)
    with atomic_directory(config.out) as directory:
        with ThreadPoolExecutor(max_workers=1) as pool:
            hashing = pool.submit(_before, config, ready, progress)
            after: dict[str, str] = {}

            def written(entry: TensorEntry, sha256: str) -> None:
                after[entry.name] = sha256

            left = write_adapted(ready.checkpoint, ready.plan, directory, progress, written)
            before = hashing.result()
        baked = open_checkpoint(directory)
        results: list[AdapterAlgebra] = []
        checks = adapter_checks(ready.plan)
        if ready.plan.gates is not None:
            checks = rotation_checks(ready.plan.gates) + checks
        if config.verify:
            checks += structure_checks(ready.checkpoint, baked, ready.plan.changed)
            results = adapter_algebra(baked, ready.plan, progress)
            checks += algebra_checks(results)
        provenance = _provenance(config, ready, found, before, after)
        write_provenance(directory, provenance)
    return _record(config, ready, provenance, checks, results, left, baked, watch)


def _record(
    config: BakeConfig,
    ready: PreparedAdapters,
    provenance: Provenance,
    checks: list[Check],
    results: list[AdapterAlgebra],
    left: list[str],
    baked: Checkpoint,
    watch: Stopwatch,
) -> Record:
    hashes = {t.name: t for t in provenance.tensors}
    rows = [
        FoldedLayer(
            layer=r.changed.layer,
            target=r.changed.entry.name,
            blocks=None,
            orthogonality_max=None,
            orthogonality_mean=None,
            angle_max=None,
            angle_mean=None,
            tensor=r.changed.entry.name,
            effect=r.comparison.effect,
            relative_error=r.comparison.relative_error,
            max_ulp=r.comparison.max_ulp,
            sha256_before=hashes[r.changed.entry.name].sha256_before,
            sha256_after=hashes[r.changed.entry.name].sha256_after,
        )
        for r in results
    ]
    gates = ready.plan.gates
    inputs = adapter_inputs(config)
    if provenance.base_fingerprint is not None:
        inputs["base"] = FileRef(
            path=str(config.base),
            sha256=provenance.base_fingerprint,
            bytes=ready.checkpoint.bytes,
            source=hub_source(config.base),
        )
    return Record(
        kind="bake",
        verdict=overall(checks),
        checks=tuple(checks),
        metrics=BakeMetrics(
            layers=rows,
            orthogonality=[drift.tolist() for drift in ready.plan.drift.values()],
            bytes_written=ready.size,
            adapters=[
                AppliedAdapter(kind=a.kind, modules=len(a.parts)) for a in ready.plan.adapters
            ],
        ).as_json(),
        notices=(*(gates.notices if gates else ()), *ready.plan.notices, *left),
        inputs=inputs,
        outputs={"baked_model": baked_ref(config.out, provenance, baked.bytes)},
        config=config.model_dump(mode="json"),
        versions=versions_of(__name__),
        run=watch.info(),
    )


def write_adapted(
    base: Checkpoint,
    plan: AdapterPlan,
    directory: Path,
    progress: Progress,
    written: Callable[[TensorEntry, str], None] | None = None,
) -> list[str]:
    """Write companions and shards into a directory that exists; notices of what is left behind.

    ``written`` is given each changed tensor and its SHA-256, see ``checkpoints.patch.patch_files``.
    """
    left = copy_companions(base.directory, base.files, directory)
    total = sum(c.entry.end - c.entry.start for c in plan.changed)
    with progress.task("baking", total=total, unit="bytes") as task:
        patch_files(
            [(shard, directory / shard.name) for shard in base.files],
            {c.entry.name: AdapterPatch(c, task) for c in plan.changed},
            written,
        )
    return left


def _named(path: Path) -> str:
    return hub_source(path) or str(path)


def memory_needed(plan: AdapterPlan) -> int:
    """Bytes that the bake needs beyond the libraries: mapped tensors and arrays of each thread."""
    largest = max((c.entry.end - c.entry.start for c in plan.changed), default=0)
    return WORKERS * (largest + MEMORY_ARRAYS * 8 * CHUNK_ELEMENTS)


def _before(config: BakeConfig, ready: PreparedAdapters, progress: Progress) -> dict[str, str]:
    entries = ready.checkpoint.tensors
    wanted = entries if config.verify else [c.entry.name for c in ready.plan.changed]
    return hash_tensors([entries[name] for name in wanted], progress)


def _provenance(
    config: BakeConfig,
    ready: PreparedAdapters,
    found: TrainedBase,
    before: Mapping[str, str],
    after: Mapping[str, str],
) -> Provenance:
    adapters = tuple(
        BakedAdapter(
            path=hub_source(path) or str(path),
            kind=files.kind,
            sha256=adapter_fingerprint(files.directory),
        )
        for path, files in zip(found.adapters, ready.plan.adapters, strict=True)
    )
    gates = ready.plan.gates
    trained = [*([gates.fingerprint] if gates else []), *(a.sha256 for a in adapters)]
    base = {"config": dict(ready.checkpoint.config), "tensors": before}
    return Provenance(
        base=hub_source(config.base) or str(config.base),
        base_fingerprint=sha256_json(base) if config.verify else None,
        rotations=_named(config.rotations or found.adapters[0]),
        rotations_fingerprint=sha256_json(trained),
        gates_fingerprint=gates.fingerprint if gates else None,
        convention=gates.convention if gates else None,
        parametrization=gates.parametrization if gates else None,
        site=gates.site if gates else None,
        adapters=adapters,
        tensors=tuple(
            BakedTensor(
                name=c.entry.name,
                layer=c.layer,
                dtype=c.dtype,
                sha256_before=before[c.entry.name],
                sha256_after=after[c.entry.name],
            )
            for c in ready.plan.changed
        ),
        versions=versions(*_VERSIONS),
    )
