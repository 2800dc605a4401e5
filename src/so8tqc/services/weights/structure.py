"""Checks on a baked checkpoint's files: structure, rotations, algebra. No model is run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from so8tqc.checkpoints.finite import Compared, compare, first_non_finite
from so8tqc.checkpoints.patch import tensor_view
from so8tqc.checkpoints.plan import PlannedTensor
from so8tqc.checkpoints.safetensors_index import Checkpoint, TensorEntry
from so8tqc.progress import SILENT, Progress
from so8tqc.record_kinds.bake import LayerDrift
from so8tqc.records import Check, judge
from so8tqc.rotations.algebra import FoldComparison, compare_fold
from so8tqc.rotations.fold import orient
from so8tqc.rotations.rotation_set import (
    ORTHOGONALITY_LIMIT,
    FloatArray,
    RotationSet,
    Target,
    rotation_angles,
)
from so8tqc.threads import WORKERS, one_torch_thread

EXACT_LIMIT_ULP = 0.5
"""A correctly rounded element is at most half a unit in the last place from the exact value."""

EFFECT_SHARE = 0.9
"""A bake must have changed each weight by at least this share of what its rotation changes."""

WORST_BLOCKS = 3
"""Blocks that the orthogonality check names."""

_IGNORED_CONFIG = frozenset({"_name_or_path", "transformers_version"})
_GATE_WORDS = ("rotation_gate", "oft_r", ".theta", "so8")


class HasEntry(Protocol):
    """A tensor that a bake changes."""

    @property
    def entry(self) -> TensorEntry:
        """Where it is in the base."""


_Planned = TypeVar("_Planned", bound=HasEntry)


class JudgedTensor(Protocol):
    """A changed tensor that was compared with its exact value."""

    @property
    def comparison(self) -> FoldComparison:
        """How far it is."""

    @property
    def non_finite(self) -> tuple[int, ...] | None:
        """Where its first NaN or infinity is."""

    @property
    def place(self) -> str:
        """Its name, for people."""


@dataclass(frozen=True)
class TargetAlgebra:
    """The comparison of one folded tensor, and where its first NaN or infinity is."""

    planned: PlannedTensor
    comparison: FoldComparison
    non_finite: tuple[int, ...] | None = None

    @property
    def place(self) -> str:
        """Layer and name."""
        return f"layer {self.planned.site.target.layer} ({self.planned.entry.name})"


def structure_checks(
    base: Checkpoint, baked: Checkpoint, planned: Sequence[HasEntry], subject: str = ""
) -> list[Check]:
    """Same tensors, shapes and dtypes; everything but the targets bit-identical; no gates left.

    NaN and infinity are looked for in every tensor but the targets, which the algebra compares.

    Compares ``baked`` with ``base``; ``planned`` says which tensors may differ.
    """
    targets = {p.entry.name for p in planned}
    common = base.tensors.keys() & baked.tensors.keys()
    missing = sorted(base.tensors.keys() - baked.tensors.keys())
    added = sorted(baked.tensors.keys() - base.tensors.keys())
    reshaped = sorted(n for n in common if base.tensors[n].shape != baked.tensors[n].shape)
    retyped = sorted(n for n in common - targets if base.tensors[n].dtype != baked.tensors[n].dtype)
    untouched = _read(base, baked, sorted(baked.tensors.keys() - targets))
    changed = sorted(
        common.intersection(n for n, found in untouched.items() if not found.equal)
        - set(reshaped)
        - set(retyped)
    )
    broken = [
        f"{name}[{', '.join(map(str, found.non_finite))}]"
        for name, found in untouched.items()
        if found.non_finite is not None
    ]
    gates = sorted(n for n in baked.tensors if any(word in n.lower() for word in _GATE_WORDS))
    config = _config_differences(base, baked)
    tokenizer = _file_differences(base.directory, baked.directory, _is_of_tokenizer)
    processor = _file_differences(base.directory, baked.directory, _is_of_processor)
    return [
        _none("structure.missing", missing, "tensor(s) of the base are missing", subject),
        _none("structure.added", added, "tensor(s) were added", subject),
        _none("structure.shapes", reshaped, "tensor(s) changed shape", subject),
        _none("structure.dtypes", retyped, "untouched tensor(s) changed dtype", subject),
        _none("structure.untouched", changed, "untouched tensor(s) changed", subject),
        _none("structure.finite", broken, "untouched tensor(s) hold NaN or infinity", subject),
        _none("structure.gates", gates, "gate tensor(s) are left", subject),
        _none("structure.config", config, "config value(s) changed", subject),
        _none("structure.tokenizer", tokenizer, "tokenizer file(s) differ", subject),
        _none("structure.processor", processor, "processor or template file(s) differ", subject),
    ]


def algebra(
    baked: Checkpoint,
    planned: Sequence[PlannedTensor],
    rotations: RotationSet,
    progress: Progress = SILENT,
) -> list[TargetAlgebra]:
    """Compare every folded tensor that has the right shape with the exact fold."""

    def compare(plan: PlannedTensor, entry: TensorEntry) -> FoldComparison:
        blocks = rotations.column_blocks(plan.site.target)
        transposed = plan.site.transposed
        matrix, oriented = orient(
            tensor_view(plan.entry), blocks, rotations.site, transposed=transposed
        )
        stored, _ = orient(tensor_view(entry), blocks, rotations.site, transposed=transposed)
        return compare_fold(matrix, stored, oriented)

    return [TargetAlgebra(*row) for row in compared(baked, planned, compare, progress)]


def compared(
    baked: Checkpoint,
    changed: Sequence[_Planned],
    compare: Callable[[_Planned, TensorEntry], FoldComparison],
    progress: Progress,
) -> list[tuple[_Planned, FoldComparison, tuple[int, ...] | None]]:
    """Compare what a bake changes with what is stored in the same shape, several at once.

    Returns:
        Each with its comparison and the place of its first NaN or infinity.
    """

    def judge_one(
        one: _Planned, entry: TensorEntry
    ) -> tuple[_Planned, FoldComparison, tuple[int, ...] | None]:
        found = compare(one, entry)
        place = first_non_finite(entry) if found.non_finite else None
        task.advance(1, item=entry.name)
        return one, found, place

    entries = [(one, baked.tensors.get(one.entry.name)) for one in changed]
    there = [(one, entry) for one, entry in entries if entry and entry.shape == one.entry.shape]
    with (
        progress.task("checking the algebra", total=len(there), unit="tensors") as task,
        one_torch_thread(),
        ThreadPoolExecutor(max_workers=WORKERS) as pool,
    ):
        return list(pool.map(lambda pair: judge_one(*pair), there))


def algebra_checks(results: Sequence[JudgedTensor], subject: str = "") -> list[Check]:
    """``algebra.exact``, ``algebra.effect`` and ``algebra.finite`` of the compared tensors."""
    if not results:
        return []
    worst = max(results, key=lambda r: r.comparison.max_ulp)
    weak = min(results, key=lambda r: effect_share(r.comparison))
    bad = [r for r in results if r.comparison.non_finite]
    share = effect_share(weak.comparison)
    expected = (
        f"Share of the expected change ‖W·R − W‖ that the bake really made, smallest in "
        f"{weak.place}: changed {weak.comparison.effect:.2e} of the norm, expected "
        f"{weak.comparison.expected_effect:.2e}."
    )
    if all(r.comparison.expected_effect == 0 for r in results):
        share, expected = 0.0, "All rotations are the identity: there is nothing to bake."
    wrong = sum(r.comparison.max_ulp > EXACT_LIMIT_ULP for r in results)
    return [
        judge(
            "algebra.exact",
            worst.comparison.max_ulp,
            EXACT_LIMIT_ULP,
            unit="ulp",
            subject=subject,
            detail=f"{len(results) - wrong} of {len(results)} tensors hold the exact fold rounded "
            f"once; the largest distance is in {worst.place}.",
        ),
        judge(
            "algebra.effect",
            share,
            EFFECT_SHARE,
            comparison=">=",
            subject=subject,
            detail=expected,
        ),
        judge(
            "algebra.finite",
            sum(r.comparison.non_finite for r in bad),
            0,
            subject=subject,
            detail="No folded element is NaN or infinite."
            if not bad
            else f"Non-finite elements, first in {bad[0].place} at "
            f"{list(bad[0].non_finite or ())}.",
        ),
    ]


def rotation_checks(rotations: RotationSet) -> list[Check]:
    """``rotation.orthogonality`` and ``rotation.determinant`` over all blocks."""
    drift = rotations.drift
    worst = sorted(
        ((float(error), f"{t}, block {k}") for t in rotations for k, error in enumerate(drift[t])),
        reverse=True,
    )[:WORST_BLOCKS]
    determinants = np.concatenate([_determinants(rotations, t) for t in rotations])
    return [
        judge(
            "rotation.orthogonality",
            worst[0][0],
            ORTHOGONALITY_LIMIT,
            target=ORTHOGONALITY_LIMIT,
            detail=f"Largest ‖RᵀR − I‖_F of {determinants.size} blocks: "
            + "; ".join(f"{error:.1e} in {place}" for error, place in worst)
            + ".",
        ),
        judge(
            "rotation.determinant",
            float(np.abs(determinants - 1).max()),
            ORTHOGONALITY_LIMIT,
            detail="Largest |det R − 1| of all blocks.",
        ),
    ]


def _determinants(rotations: RotationSet, target: Target) -> FloatArray:
    """Of each block; in front of the output head a reflection is allowed, and counts as +1."""
    found: FloatArray = np.linalg.det(rotations.blocks[target])
    return np.abs(found) if target.is_head else found


def rotation_rows(rotations: RotationSet) -> list[LayerDrift]:
    """One row per target: drift and angles (radians) of its blocks, and of each block."""
    rows: list[LayerDrift] = []
    for target in rotations:
        blocks = rotations.blocks[target]
        errors, angles = rotations.drift[target], rotation_angles(blocks)
        rows.append(
            LayerDrift(
                layer=target.layer,
                target="output head" if target.is_head else target.module or "attention output",
                blocks=blocks.shape[0],
                orthogonality_max=float(errors.max()),
                orthogonality_mean=float(errors.mean()),
                angle_max=float(angles.max()),
                angle_mean=float(angles.mean()),
            )
        )
    return rows


def effect_share(comparison: FoldComparison) -> float:
    """‖M' − M‖ over ‖M·B − M‖; a rotation by nothing is fulfilled by changing nothing."""
    if comparison.expected_effect == 0:
        return 1.0 if comparison.effect == 0 else float("inf")
    return comparison.effect / comparison.expected_effect


def _none(check_id: str, names: Sequence[str], what: str, subject: str) -> Check:
    detail = (
        f"No {what}."
        if not names
        else f"{len(names)} {what}: {', '.join(names[:5])}" + (" …" if len(names) > 5 else "")
    )
    return judge(check_id, len(names), 0, subject=subject, detail=detail)


def _read(base: Checkpoint, baked: Checkpoint, names: Sequence[str]) -> dict[str, Compared]:
    """Tensors of ``baked`` beside those of the base, in order; on all cores.

    One that the base does not have, or has in another form, is not equal.
    """

    def read(name: str) -> Compared:
        entry, other = baked.tensors[name], base.tensors.get(name)
        if other is None or (entry.dtype, entry.shape) != (other.dtype, other.shape):
            return Compared(equal=False, non_finite=first_non_finite(entry))
        return compare(other, entry)

    with ThreadPoolExecutor(max_workers=WORKERS) as pool:
        return dict(zip(names, pool.map(read, names), strict=True))


def _config_differences(base: Checkpoint, baked: Checkpoint) -> list[str]:
    keys = (base.config.keys() | baked.config.keys()) - _IGNORED_CONFIG
    return sorted(k for k in keys if base.config.get(k) != baked.config.get(k))


def _is_of_tokenizer(file: Path) -> bool:
    starts = ("tokenizer", "vocab", "merges", "special_tokens", "spiece")
    return file.name.startswith(starts) or file.name in (
        "generation_config.json",
        "added_tokens.json",
    )


def _is_of_processor(file: Path) -> bool:
    """Whether a file says how pictures, sounds or a conversation become a model's input."""
    return file.name.endswith("processor_config.json") or (
        file.name.startswith("chat_template") or "additional_chat_templates" in file.parts
    )


def _file_differences(base: Path, baked: Path, wanted: Callable[[Path], bool]) -> list[str]:
    """Files of one kind beside the weights whose content differs (JSON compared as values)."""
    names = {
        file.relative_to(directory)
        for directory in (base, baked)
        for file in (*directory.iterdir(), *directory.glob("additional_chat_templates/*"))
        if file.is_file() and wanted(file.relative_to(directory))
    }
    return sorted(str(name) for name in names if not _same_content(base / name, baked / name))


def _same_content(a: Path, b: Path) -> bool:
    """Whether two files hold the same bytes, or JSON of the same value; both may be absent."""
    if not a.is_file() or not b.is_file():
        return a.is_file() == b.is_file()
    left, right = a.read_bytes(), b.read_bytes()
    if left == right:
        return True
    if a.suffix != ".json":
        return False
    try:
        return bool(json.loads(left) == json.loads(right))
    except (ValueError, RecursionError):
        return False
