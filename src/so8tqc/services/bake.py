"""Bake: fold rotations into a checkpoint, re-read it from disk and prove it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from so8tqc.adapters.trained import trained
from so8tqc.architectures import ARCHITECTURES
from so8tqc.checkpoints.baking import TensorFold, hash_tensors
from so8tqc.checkpoints.copy import copy_companions
from so8tqc.checkpoints.patch import patch_files
from so8tqc.checkpoints.plan import (
    PlannedTensor,
    bytes_needed,
    fitted,
    memory_estimate,
    plan_bake,
)
from so8tqc.checkpoints.provenance import (
    PROVENANCE_NAME,
    BakedTensor,
    Provenance,
    baked_ref,
    read_provenance,
    write_provenance,
)
from so8tqc.checkpoints.quantized import require_unquantized
from so8tqc.checkpoints.safetensors_index import Checkpoint, open_checkpoint
from so8tqc.checkpoints.skeleton import skeleton
from so8tqc.closure import versions_of
from so8tqc.config import BakeConfig
from so8tqc.disk.atomic import atomic_directory, remove_leftovers, require_space
from so8tqc.disk.digests import file_ref, hub_source, sha256_json
from so8tqc.disk.locks import claim_output, exclusive
from so8tqc.errors import ConfigError, ModelError
from so8tqc.progress import SILENT, Progress
from so8tqc.record_kinds.bake import (
    BakeMetrics,
    FoldedLayer,
    HowRead,
    LayerDrift,
    PlanMetrics,
    PlannedFold,
)
from so8tqc.records import Check, FileRef, Record, Stopwatch, overall, versions
from so8tqc.rotations.read import open_raw
from so8tqc.rotations.rotation_set import RotationSet, Target
from so8tqc.services.adapter_bake import (
    PreparedAdapters,
    adapter_inputs,
    bake_adapters,
    memory_needed,
    prepare_adapters,
)
from so8tqc.services.trained_base import stray_gates, trained_base
from so8tqc.services.weights.adapters import adapter_checks
from so8tqc.services.weights.projection import projection_check
from so8tqc.services.weights.structure import (
    TargetAlgebra,
    algebra,
    algebra_checks,
    rotation_checks,
    rotation_rows,
    structure_checks,
)
from so8tqc.sources.inputs.hub import with_local_paths


@dataclass(frozen=True)
class _Prepared:
    """A bake that has passed every check that needs no writing."""

    config: BakeConfig
    checkpoint: Checkpoint
    reading: Future[RotationSet]
    planned: tuple[PlannedTensor, ...]
    size: int
    recognised: str | None

    @property
    def rotations(self) -> RotationSet:
        """The rotations; waits until they are computed.

        Raises:
            RotationError: they are none.
        """
        return self.reading.result()


@dataclass(frozen=True)
class _Summary:
    """What there is to say about the rotations themselves.

    Attributes:
        checks: their orthogonality and determinants.
        rows: target → its line of the table.
        drift: ‖RᵀR − I‖_F of each block, target by target.
    """

    checks: list[Check]
    rows: Mapping[Target, LayerDrift]
    drift: list[list[float]]


@dataclass(frozen=True)
class _Proof:
    """What reading the result back from disk has shown.

    Attributes:
        checks: structure and algebra.
        results: the comparison of every folded tensor with the exact fold.
    """

    checks: list[Check] = field(default_factory=list)
    results: list[TargetAlgebra] = field(default_factory=list)


@exclusive(claim_output)
def bake(config: BakeConfig, progress: Progress = SILENT) -> Record:
    """Fold rotations into a checkpoint: W' = W·C on every target (see ``rotations.fold``).

    The result appears at ``config.out`` complete or not at all. With ``config.verify`` it is read
    back from disk before and judged: structure, rotations, algebra.

    A base whose own weights hold the gates needs no ``rotations``.

    Record metrics: :class:`so8tqc.record_kinds.bake.BakeMetrics`.

    Raises:
        ConfigError: rotations that leave facts open; none, for a base without gates.
        InputError: base or rotations are malformed or do not fit each other.
        ModelError: the base was already baked (``force`` overrides).
        ToolError: the disk has no room.
    """
    watch = Stopwatch()
    config = with_local_paths(config, progress)
    if trained(config.rotations, config).adapters:
        _refuse_second_bake(config)
        with trained_base(config.base, config.rotations, config, config.out) as base:
            return bake_adapters(config, prepare_adapters(config, base), base, watch, progress)
    with _prepared(config) as ready:
        return _bake(ready.config, ready, watch, progress)


def _bake(config: BakeConfig, ready: _Prepared, watch: Stopwatch, progress: Progress) -> Record:
    require_space(config.out.parent, ready.size, "the baked model needs {}")
    remove_leftovers(config.out.parent)
    with atomic_directory(config.out) as directory:
        # writing waits for the disk; the rest leaves the interpreter lock to the fold
        with ThreadPoolExecutor(max_workers=2) as pool:
            hashing = pool.submit(_hashed, config, ready, progress)
            summarising = pool.submit(lambda: _summary(ready.rotations))
            left = _write(ready, directory, progress)
            before, summary = hashing.result(), summarising.result()
        baked = open_checkpoint(directory)
        with ThreadPoolExecutor(max_workers=1) as pool:
            folded = [baked.tensors[p.entry.name] for p in ready.planned]
            hashing = pool.submit(hash_tensors, folded, SILENT)
            proof = _prove(ready, baked, progress) if config.verify else _Proof()
            after = hashing.result()
        provenance = _provenance(config, ready, before, after)
        write_provenance(directory, provenance)

    checks = summary.checks + proof.checks
    return Record(
        kind="bake",
        verdict=overall(checks),
        checks=tuple(checks),
        metrics=BakeMetrics(
            layers=_rows(summary.rows, proof.results, provenance),
            orthogonality=summary.drift,
            bytes_written=ready.size,
            reading=_reading(ready),
        ).as_json(),
        notices=(*ready.rotations.notices, *left),
        inputs=_inputs(config, ready, provenance.base_fingerprint),
        outputs={"baked_model": baked_ref(config.out, provenance, baked.bytes)},
        config=config.model_dump(mode="json"),
        versions=versions_of(__name__),
        run=watch.info(),
    )


def plan(config: BakeConfig, progress: Progress = SILENT) -> Record:
    """What :func:`bake` would do, without writing: ``bake --dry-run``.

    Record metrics: :class:`so8tqc.record_kinds.bake.PlanMetrics`.

    Raises:
        InputError, ModelError: as :func:`bake`.
    """
    watch = Stopwatch()
    config = with_local_paths(config, progress)
    if trained(config.rotations, config).adapters:
        _refuse_second_bake(config)
        with trained_base(config.base, config.rotations, config, config.out) as base:
            return _plan_adapters(config, prepare_adapters(config, base), watch, progress)
    with _prepared(config) as ready:
        return _plan(ready, watch, progress)


def _plan(ready: _Prepared, watch: Stopwatch, progress: Progress) -> Record:
    config = ready.config
    summary = _summary(ready.rotations)
    progress.message(f"{len(ready.planned)} tensors would be folded; nothing was written")
    return Record(
        kind="bake-plan",
        verdict=overall(summary.checks),
        checks=tuple(summary.checks),
        metrics=PlanMetrics(
            tensors=[
                PlannedFold(
                    name=p.entry.name,
                    shape=list(p.entry.shape),
                    dtype=p.entry.dtype,
                    baked_dtype=p.dtype,
                    bytes=p.entry.end - p.entry.start,
                )
                for p in ready.planned
            ],
            layers=list(summary.rows.values()),
            orthogonality=summary.drift,
            bytes_written=ready.size,
            reading=_reading(ready),
            disk_free_bytes=shutil.disk_usage(_existing(config.out)).free,
            memory_bytes=memory_estimate(ready.planned),
        ).as_json(),
        notices=ready.rotations.notices,
        inputs={"rotations": file_ref(_rotations(config))},
        config=config.model_dump(mode="json"),
        versions=versions_of(__name__),
        run=watch.info(),
    )


def _plan_adapters(
    config: BakeConfig, ready: PreparedAdapters, watch: Stopwatch, progress: Progress
) -> Record:
    """What a bake of adapters would do; metrics as :func:`plan`."""
    checks = adapter_checks(ready.plan)
    progress.message(f"{len(ready.plan.changed)} tensors would change; nothing was written")
    return Record(
        kind="bake-plan",
        verdict=overall(checks),
        checks=tuple(checks),
        metrics=PlanMetrics(
            tensors=[
                PlannedFold(
                    name=c.entry.name,
                    shape=list(c.entry.shape),
                    dtype=c.entry.dtype,
                    baked_dtype=c.dtype,
                    bytes=c.entry.end - c.entry.start,
                )
                for c in ready.plan.changed
            ],
            layers=[],
            orthogonality=[drift.tolist() for drift in ready.plan.drift.values()],
            bytes_written=ready.size,
            disk_free_bytes=shutil.disk_usage(_existing(config.out)).free,
            memory_bytes=memory_needed(ready.plan),
        ).as_json(),
        notices=ready.plan.notices,
        inputs=adapter_inputs(config),
        config=config.model_dump(mode="json"),
        versions=versions_of(__name__),
        run=watch.info(),
    )


def planned_bytes(config: BakeConfig) -> int:
    """Bytes that :func:`bake` would write; raises what that would raise before it writes."""
    if trained(config.rotations, config).adapters:
        with trained_base(config.base, config.rotations, config, config.out) as base:
            return prepare_adapters(config, base).size
    with _prepared(config) as ready:
        ready.reading.result()
        return ready.size


@contextmanager
def _prepared(config: BakeConfig) -> Iterator[_Prepared]:
    """Everything but the rotations' values, which are computed meanwhile: a plan needs none."""
    if not (config.base / "config.json").is_file():
        open_checkpoint(config.base)  # says what is wrong with it
    _refuse_second_bake(config)
    with (
        trained_base(config.base, config.rotations, config, config.out) as base,
        ThreadPoolExecutor(max_workers=1) as reader,
    ):
        checkpoint = open_checkpoint(base.directory)
        require_unquantized(checkpoint)
        source = base.source
        if source is None or base.rotations is None:
            if stray_gates(config.base):
                open_raw(config.base, config)  # says why they are none that could be baked
            raise ConfigError(
                "no rotations are given, and the model's own weights hold no gates",
                where=str(config.base),
                remedy=f"Give them: so8tqc bake {config.base} ROTATIONS --out {config.out}",
            )
        if checkpoint.model_type not in ARCHITECTURES:
            skeleton(checkpoint)  # before other threads import what it imports
        reading = reader.submit(lambda: fitted(source.rotations(), checkpoint))
        planned = plan_bake(
            checkpoint,
            reading.result() if source.shared else source,
            dtype=config.baked_dtype,
            all_layers=config.layers is None,
            kept=base.kept,
        )
        yield _Prepared(
            config.model_copy(update={"rotations": base.rotations}),
            checkpoint,
            reading,
            planned,
            bytes_needed(checkpoint, planned),
            source.metadata.get("recognised"),
        )


def _rotations(config: BakeConfig) -> Path:
    """Where the rotations come from, which a prepared bake knows."""
    return config.rotations or config.base


def _summary(rotations: RotationSet) -> _Summary:
    return _Summary(
        checks=rotation_checks(rotations),
        rows=dict(zip(rotations, rotation_rows(rotations), strict=True)),
        drift=[errors.tolist() for errors in rotations.drift.values()],
    )


def _inputs(config: BakeConfig, ready: _Prepared, fingerprint: str | None) -> dict[str, FileRef]:
    rotations = FileRef(
        path=str(_rotations(config)),
        sha256=ready.rotations.fingerprint,
        bytes=file_ref(_rotations(config)).bytes,
        source=hub_source(_rotations(config)),
    )
    if fingerprint is None:
        return {"rotations": rotations}
    base = FileRef(
        path=str(config.base),
        sha256=fingerprint,
        bytes=ready.checkpoint.bytes,
        source=hub_source(config.base),
    )
    return {"base": base, "rotations": rotations}


def _refuse_second_bake(config: BakeConfig) -> None:
    if read_provenance(config.base) is not None and not config.force:
        raise ModelError(
            "this directory was already baked; baking it again would rotate twice",
            where=str(config.base / PROVENANCE_NAME),
            remedy="Give the base model, or --force if you really mean it.",
        )
    inside = config.out.resolve()
    base = config.base.resolve()
    if inside == base or base in inside.parents or inside in base.parents:
        raise ModelError(
            "the output may not be the base directory, lie in it, or contain it",
            where=str(config.out),
        )


def _reading(ready: _Prepared) -> HowRead:
    """How the rotations were read, and by which names that was recognised."""
    return HowRead(
        parametrization=str(ready.rotations.parametrization),
        convention=str(ready.rotations.convention),
        site=str(ready.rotations.site),
        recognised=ready.recognised,
    )


def _existing(path: Path) -> Path:
    """The nearest parent that exists."""
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def _write(ready: _Prepared, directory: Path, progress: Progress) -> list[str]:
    """Write companions and shards; return notices about files left behind."""
    base = ready.checkpoint
    left = copy_companions(base.directory, base.files, directory)
    total = sum(p.entry.end - p.entry.start for p in ready.planned)
    with progress.task("baking", total=total, unit="bytes") as task:
        patch_files(
            [(shard, directory / shard.name) for shard in base.files],
            {p.entry.name: TensorFold(p, ready.reading.result, task) for p in ready.planned},
        )
    return left


def _prove(ready: _Prepared, baked: Checkpoint, progress: Progress) -> _Proof:
    """Read everything back; comparing bytes leaves the interpreter lock to the algebra."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        structure = pool.submit(structure_checks, ready.checkpoint, baked, ready.planned)
        results = algebra(baked, ready.planned, ready.rotations, progress)
        projection = projection_check(ready.checkpoint, ready.planned, ready.rotations)
        return _Proof([*structure.result(), projection, *algebra_checks(results)], results)


def _hashed(config: BakeConfig, ready: _Prepared, progress: Progress) -> dict[str, str]:
    """SHA-256 of the whole base for a bake that reads everything back, else of what is folded."""
    ready.reading.result()  # of what cannot be baked nothing needs to be hashed
    if config.verify:
        return hash_tensors(list(ready.checkpoint.tensors.values()), progress)
    return hash_tensors([p.entry for p in ready.planned], progress)


def _provenance(
    config: BakeConfig, ready: _Prepared, before: Mapping[str, str], after: Mapping[str, str]
) -> Provenance:
    fingerprint = sha256_json({"config": dict(ready.checkpoint.config), "tensors": before})
    return Provenance(
        base=hub_source(config.base) or str(config.base),
        base_fingerprint=fingerprint if config.verify else None,
        rotations=hub_source(_rotations(config)) or str(_rotations(config)),
        rotations_fingerprint=ready.rotations.fingerprint,
        convention=ready.rotations.convention,
        parametrization=ready.rotations.parametrization,
        site=ready.rotations.site,
        recognised=ready.recognised,
        tensors=tuple(
            BakedTensor(
                name=p.entry.name,
                layer=p.site.target.layer,
                dtype=p.dtype,
                sha256_before=before[p.entry.name],
                sha256_after=after[p.entry.name],
            )
            for p in ready.planned
        ),
        versions=versions("torch", "safetensors", "numpy"),
    )


def _rows(
    rotations: Mapping[Target, LayerDrift],
    results: list[TargetAlgebra],
    provenance: Provenance,
) -> list[FoldedLayer]:
    """One row per folded tensor, its target's drift beside its own fidelity."""
    tensors = {tensor.name: tensor for tensor in provenance.tensors}
    return [
        FoldedLayer(
            **dict(rotations[result.planned.site.target]),
            tensor=result.planned.entry.name,
            effect=result.comparison.effect,
            relative_error=result.comparison.relative_error,
            max_ulp=result.comparison.max_ulp,
            sha256_before=tensors[result.planned.entry.name].sha256_before,
            sha256_after=tensors[result.planned.entry.name].sha256_after,
        )
        for result in results
    ]
