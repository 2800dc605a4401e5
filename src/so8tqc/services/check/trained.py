"""What a training left: gate files, adapters, recorded logits. Judged by themselves."""

from __future__ import annotations

from pathlib import Path

from so8tqc.adapters.files import adapter_directory, read_files, read_json
from so8tqc.checkpoints.finite import first_non_finite
from so8tqc.checkpoints.safetensors_index import read_header
from so8tqc.records import Check, judge
from so8tqc.rotations.blocks import target_blocks
from so8tqc.rotations.read import open_raw
from so8tqc.rotations.readings import missing_facts, readings
from so8tqc.rotations.rotation_set import ORTHOGONALITY_LIMIT, orthogonality_error
from so8tqc.services.check.judged import Judged, named, told
from so8tqc.services.check.nearby import base_for
from so8tqc.sources.capture import open_capture
from so8tqc.wording import counted, listed


def judge_gates(path: Path, base: Path | None) -> Judged:
    """A gate file or checkpoint: finite, rotations, and whether its reading is known.

    Raises:
        RotationError: it holds no gates, or cannot be read.
    """
    raw = open_raw(path)
    missing = missing_facts(raw)
    judged = Judged(f"{named(path)}: {counted(len(raw.theta), 'rotation gate')}")
    import numpy as np

    broken = [str(target) for target, theta in raw.theta.items() if not np.isfinite(theta).all()]
    judged.add([_finite(broken, len(raw.theta), "gate")], "all of its gates are finite")
    if raw.parametrization is not None and not broken:
        judged.add([_drift(raw, path)], "each of their blocks is a rotation")
    at = base_for(path, base)
    where = base or at or "BASE"
    if missing:
        possible = counted(len(readings(raw)), "reading")
        judged.unseen.append(
            f"what they do: it does not say its {', '.join(missing)} ({possible} possible, none "
            "is assumed)"
        )
        judged.next = told("identify", where, path)
        return judged
    facts = ", ".join(str(getattr(raw, f)) for f in ("parametrization", "convention", "site"))
    judged.what += f" ({facts})"
    judged.unseen.append("whether they fit a base, and were baked into one (give the base, too)")
    judged.next = told("bake", where, path, "--out", _beside(path, "baked"))
    return judged


def _drift(raw: object, path: Path) -> Check:
    from so8tqc.rotations.files.raw import RawRotations

    assert isinstance(raw, RawRotations)
    assert raw.parametrization is not None  # the caller's condition
    blocks = target_blocks(dict(raw.theta), raw.parametrization, str(path))
    worst = max(float(orthogonality_error(b).max()) for b in blocks.values())
    return judge(
        "rotation.orthogonality",
        worst,
        ORTHOGONALITY_LIMIT,
        detail=f"Largest ‖RᵀR − I‖_F of all blocks: {worst:.1e}.",
    )


def _finite(broken: list[str], count: int, noun: str) -> Check:
    return judge(
        "file.finite",
        len(broken),
        0,
        detail=f"With NaN or infinity: {listed(broken)}."
        if broken
        else f"All of its {counted(count, noun)} are whole and finite.",
    )


def judge_adapter(path: Path, base: Path | None) -> Judged:
    """A PEFT adapter: readable, finite, of a method that can be baked.

    Raises:
        RotationError: it is none, or cannot be read.
    """
    directory = adapter_directory(path)
    config = read_json(directory)
    kind = str(config.get("peft_type"))
    meant = str(config.get("base_model_name_or_path") or "")
    files = read_files(path)  # which refuses what is not finite
    judged = Judged(f"{named(path)}: a PEFT adapter, {kind}, of {len(files.parts)} modules")
    judged.add([_finite([], len(files.parts), "module")], "all of its tensors are finite")
    if meant:
        judged.what += f", trained on {meant}"
    where = (
        base or base_for(path, base) or (Path(meant) if meant and Path(meant).exists() else None)
    )
    judged.unseen.append("whether it fits its base, and was merged into one (give the base, too)")
    judged.next = told("bake", where or meant or "BASE", path, "--out", _beside(path, "baked"))
    return judged


def judge_capture(path: Path) -> Judged:
    """Recorded logits: whole, finite, with token ids that fit.

    Raises:
        ModelError, DataError: it is none.
    """
    capture = open_capture(path)
    broken = [e.name for e in read_header(path) if first_non_finite(e) is not None]
    tokens = counted(capture.tokens, "token")
    judged = Judged(f"{named(path)}: recorded logits of {tokens}, a reference for qc")
    judged.add([_finite(broken, len(capture.texts), "text")], "all of its logits are finite")
    judged.unseen.append("what gives such logits (give a model or GGUF file, too)")
    judged.next = told("check", path, "CANDIDATE")
    return judged


def _beside(path: Path, name: str) -> Path:
    return path.parent / name
