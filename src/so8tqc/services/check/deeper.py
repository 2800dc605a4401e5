"""The deeper judgements, by the services that make them: ``qc`` and ``verify``.

``check`` has no measure of its own for a model. It finds what these need, and gives it to them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from so8tqc.checkpoints.provenance import Provenance
from so8tqc.config import CheckConfig, QCConfig, VerifyConfig
from so8tqc.errors import InputError, ToolError
from so8tqc.gguf.file import is_gguf
from so8tqc.progress import Progress
from so8tqc.record_kinds.qc import QCMetrics
from so8tqc.records import Check, Record, Verdict, judge
from so8tqc.rotations.options import RotationOptions
from so8tqc.services.check.judged import Judged
from so8tqc.wording import counted

_WEIGHTS_RUN_UNASKED = 5e8
"""Weights of a model that is run without ``--level full``: some minutes on two cores."""

_BYTES_EACH = 12
"""Memory for each weight while base, candidate and a fold are run in float32."""


def rotation_options(provenance: Provenance | None, adapters: Sequence[Path]) -> RotationOptions:
    """How a bake read its rotations."""
    words = {} if provenance is None else {
        name: value
        for name in ("parametrization", "convention", "site")
        if (value := getattr(provenance, name)) is not None
    }  # fmt: skip
    return RotationOptions.model_validate({**words, "adapters": tuple(adapters)})


def level_for(config: CheckConfig, weights: int) -> tuple[str, str]:
    """``files`` or ``full``, and why no model is run, "" where it is.

    Args:
        config: of the check.
        weights: of the model.
    """
    if config.level != "auto":
        return config.level, "" if config.level == "full" else "its logits (give --level full)"
    import psutil

    if weights > _WEIGHTS_RUN_UNASKED:
        return "files", f"its logits, since {weights / 1e9:.1f}e9 weights take long: --level full"
    if weights * _BYTES_EACH > psutil.virtual_memory().available:
        return "files", "its logits, for which there may be too little memory: --level full"
    return "full", ""


def judge_by_qc(
    judged: Judged,
    config: CheckConfig,
    reference: Path,
    candidate: Path,
    progress: Progress,
    *,
    rotations: Path | None = None,
    options: RotationOptions | None = None,
    level: str = "files",
    tokenizer: Path | None = None,
) -> None:
    """Add what ``qc`` says of a candidate; what it refuses as not belonging together fails."""
    from so8tqc.services.qc.service import qc

    with tempfile.TemporaryDirectory(prefix="so8tqc-") as scratch:
        asked = QCConfig(
            reference=reference,
            candidates=(_with_ending(candidate, Path(scratch)),),
            rotations=rotations,
            rotation_options=options or RotationOptions(),
            data=config.data,
            tokenizer=tokenizer,
            max_tokens=config.max_tokens,
            threads=config.threads,
            level="full" if level == "full" else "files",
            out=Path(scratch) / "qc",
        )
        try:
            record = qc(asked, progress)
        except InputError as error:
            judged.add([judge("file.belongs", 1, 0, detail=str(error))])
            return
        except ToolError as error:
            judged.unseen.append(f"its logits: {error}")
            return
    judged.diagnosis += record.diagnosis
    judged.notices += record.notices
    about_it = [check for check in record.checks if check.subject]
    good = judged.add(record.checks, _proof(record, about_it, reference.name))
    judged.proved |= good and any(check.verdict is Verdict.PASS for check in about_it)


def _proof(record: Record, checks: Sequence[Check], reference: str) -> str:
    """What qc has shown of its one candidate, in a few words."""
    found = {check.id: check for check in checks}
    said = []
    if "algebra.exact" in found:
        said.append("every baked element is the exact fold, rounded once")
    elif "algebra.nearest" in found and found["algebra.nearest"].verdict is Verdict.PASS:
        said.append("the right fold explains its attention outputs best")
    measured = next(iter(QCMetrics.of(record).candidates.values()), None)
    if measured is not None and (kl := found.get("kl.mean")) is not None:
        texts = counted(measured.texts or 0, "text")
        said.append(f"mean KL {kl.value:.3g} nats from {reference} as trained, over {texts}")
    return ", ".join(said) or f"nothing of it departs from {reference}"


def _with_ending(path: Path, scratch: Path) -> Path:
    """The file under a name by which the services know what it is."""
    if not path.is_file() or is_gguf(path) or path.suffix == ".safetensors":
        return path
    link = scratch / f"{path.name}.gguf"
    link.symlink_to(path.resolve())
    return link


def judge_by_verify(
    judged: Judged, file: Path, record: Path, source: Path, progress: Progress
) -> None:
    """Add what ``verify`` says of a quantized file: its recipe, run again."""
    from so8tqc.services.attest.verify_file import verify

    try:
        again = verify(VerifyConfig(file=file, record=record, input=source), progress)
    except (ToolError, InputError) as error:
        judged.unseen.append(f"whether its recipe makes it: {error}")
        return
    proof = f"made again from {source.name} by its recipe, it is the same"
    judged.proved |= judged.add(again.checks, proof)
