"""Bake: fold rotations into a checkpoint, re-read it from disk and prove it."""

from __future__ import annotations

import shutil
from pathlib import Path

from so8tqc.artifacts import atomic_directory, file_ref, remove_leftovers, sha256_json
from so8tqc.checkpoints.baking import TensorFold, sha256_tensor
from so8tqc.checkpoints.copy import companion_files, copy_file
from so8tqc.checkpoints.patch import patch_file
from so8tqc.checkpoints.plan import PlannedTensor, bytes_needed, plan_bake
from so8tqc.checkpoints.provenance import (
    PROVENANCE_NAME,
    BakedTensor,
    Provenance,
    read_provenance,
    write_provenance,
)
from so8tqc.checkpoints.safetensors_index import Checkpoint, open_checkpoint
from so8tqc.config import BakeConfig
from so8tqc.errors import ModelError, ToolError
from so8tqc.progress import SILENT, Progress
from so8tqc.records import FileRef, Record, Stopwatch, jsonable, overall, versions
from so8tqc.rotations.read import read_rotations
from so8tqc.rotations.rotation_set import RotationSet, orthogonality_error
from so8tqc.services.structure import (
    TargetAlgebra,
    algebra,
    algebra_checks,
    rotation_checks,
    rotation_rows,
    structure_checks,
)


def bake(config: BakeConfig, progress: Progress = SILENT) -> Record:
    """Fold rotations into a checkpoint: W' = W·C on every target (see ``rotations.fold``).

    The result appears at ``config.out`` complete or not at all. It is then read back
    from disk and judged: structure, rotations, algebra.

    Record metrics: ``layers`` (one row per folded tensor: drift, angles, effect, distance
    from the exact fold in ulps, sha256 before and after), ``orthogonality`` (‖RᵀR − I‖_F,
    targets × blocks), ``bytes_written``.

    Raises:
        InputError: base or rotations are malformed or do not fit each other.
        ModelError: the base was already baked (``force`` overrides).
        ToolError: the disk has no room.
    """
    watch = Stopwatch()
    checkpoint = open_checkpoint(config.base)
    _refuse_second_bake(config)
    rotations = read_rotations(config.rotations, config)
    planned = plan_bake(
        checkpoint, rotations, dtype=config.baked_dtype, all_layers=config.layers is None
    )
    size = bytes_needed(checkpoint, planned)
    _preflight(config, size)
    remove_leftovers(config.out.parent)

    notices = list(rotations.notices)
    with atomic_directory(config.out) as directory:
        notices += _write(checkpoint, rotations, planned, directory, progress)
        hashes = _hashes(checkpoint, open_checkpoint(directory), planned, progress)
        provenance = _provenance(config, checkpoint, rotations, planned, hashes)
        write_provenance(directory, provenance)

    baked = open_checkpoint(config.out)
    results = algebra(baked, planned, rotations, progress)
    checks = [
        *structure_checks(checkpoint, baked, planned),
        *rotation_checks(rotations),
        *algebra_checks(results),
    ]
    return Record(
        kind="bake",
        verdict=overall(checks),
        checks=tuple(checks),
        metrics={
            "layers": jsonable(_rows(rotations, results, provenance)),
            "orthogonality": jsonable(
                [orthogonality_error(rotations.blocks[t]) for t in rotations]
            ),
            "bytes_written": size,
        },
        notices=tuple(notices),
        inputs={
            "base": FileRef(
                path=str(config.base), sha256=provenance.base_fingerprint, bytes=checkpoint.bytes
            ),
            "rotations": FileRef(
                path=str(config.rotations),
                sha256=rotations.fingerprint,
                bytes=file_ref(config.rotations).bytes,
            ),
        },
        outputs={
            "baked_model": FileRef(
                path=str(config.out),
                sha256=sha256_json([t.model_dump(mode="json") for t in provenance.tensors]),
                bytes=baked.bytes,
            )
        },
        config=config.model_dump(mode="json"),
        versions=versions("torch", "safetensors", "numpy"),
        run=watch.info(),
    )


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


def _preflight(config: BakeConfig, size: int) -> None:
    parent = config.out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
    except OSError as error:
        raise ToolError(f"cannot write here: {error.strerror}", where=str(config.out)) from None
    if free < size:
        raise ToolError(
            f"the baked model needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
            where=str(parent),
        )


def _write(
    checkpoint: Checkpoint,
    rotations: RotationSet,
    planned: tuple[PlannedTensor, ...],
    directory: Path,
    progress: Progress,
) -> list[str]:
    """Write companions and shards; return notices about files left behind."""
    keep, leave = companion_files(checkpoint.directory, checkpoint.files)
    for file in keep:
        destination = directory / file.relative_to(checkpoint.directory)
        destination.parent.mkdir(parents=True, exist_ok=True)
        copy_file(file, destination)
    total = sum(p.entry.end - p.entry.start for p in planned)
    with progress.task("baking", total=total, unit="bytes") as task:
        for shard in checkpoint.files:
            patches = {
                p.entry.name: TensorFold(p, rotations, task)
                for p in planned
                if p.entry.file == shard
            }
            patch_file(shard, directory / shard.name, patches)
    if leave:
        names = ", ".join(file.name for file in leave[:5])
        return [f"Left behind, since these weights would not be baked: {names}."]
    return []


def _hashes(
    base: Checkpoint, baked: Checkpoint, planned: tuple[PlannedTensor, ...], progress: Progress
) -> dict[str, tuple[str, str]]:
    """SHA-256 of every tensor before, and of the folded ones after."""
    changed = {p.entry.name for p in planned}
    hashes: dict[str, tuple[str, str]] = {}
    with progress.task("hashing", total=base.bytes, unit="bytes") as task:
        for name, entry in base.tensors.items():
            before = sha256_tensor(entry)
            hashes[name] = (
                before,
                sha256_tensor(baked.tensors[name]) if name in changed else before,
            )
            task.advance(entry.end - entry.start, item=name)
    return hashes


def _provenance(
    config: BakeConfig,
    checkpoint: Checkpoint,
    rotations: RotationSet,
    planned: tuple[PlannedTensor, ...],
    hashes: dict[str, tuple[str, str]],
) -> Provenance:
    return Provenance(
        base=str(config.base),
        base_fingerprint=sha256_json(
            {
                "config": dict(checkpoint.config),
                "tensors": {name: before for name, (before, _) in hashes.items()},
            }
        ),
        rotations=str(config.rotations),
        rotations_fingerprint=rotations.fingerprint,
        convention=rotations.convention,
        parametrization=rotations.parametrization,
        site=rotations.site,
        tensors=tuple(
            BakedTensor(
                name=p.entry.name,
                layer=p.site.target.layer,
                dtype=p.dtype,
                sha256_before=hashes[p.entry.name][0],
                sha256_after=hashes[p.entry.name][1],
            )
            for p in planned
        ),
        versions=versions("torch", "safetensors", "numpy"),
    )


def _rows(
    rotations: RotationSet, results: list[TargetAlgebra], provenance: Provenance
) -> list[dict[str, object]]:
    """One row per folded tensor, its target's drift beside its own fidelity."""
    drift = dict(zip(rotations, rotation_rows(rotations), strict=True))
    tensors = {tensor.name: tensor for tensor in provenance.tensors}
    return [
        {
            **drift[result.planned.site.target],
            "tensor": result.planned.entry.name,
            "effect": result.comparison.effect,
            "relative_error": result.comparison.relative_error,
            "max_ulp": result.comparison.max_ulp,
            "sha256_before": tensors[result.planned.entry.name].sha256_before,
            "sha256_after": tensors[result.planned.entry.name].sha256_after,
        }
        for result in results
    ]
