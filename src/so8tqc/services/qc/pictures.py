"""What only pictures show: tokens after them apart, rope's sections, whose gates act where."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from so8tqc.check_guide import DIAGNOSES
from so8tqc.checkpoints.safetensors_index import Checkpoint, open_checkpoint
from so8tqc.errors import ModelError
from so8tqc.gguf.conversion import read_conversion
from so8tqc.gguf.file import is_gguf, open_gguf
from so8tqc.gguf.mmproj import open_mmproj, require_same_width
from so8tqc.gguf.rewrite import key_values
from so8tqc.llama.converter import trace_conversion
from so8tqc.llama.guarded_script import VISION
from so8tqc.llama.vendor import find_converter
from so8tqc.metrics.divergence import TokenTable, summarise
from so8tqc.progress import Progress
from so8tqc.record_kinds.qc import Apart, Statistics
from so8tqc.records import Check, Diagnosis, Verdict, judge
from so8tqc.rotations.rotation_set import RotationSet
from so8tqc.services.export.comparison import TensorComparison
from so8tqc.services.export.vision import Vision, is_of_vision, vision_checks
from so8tqc.sources.capture import Capture, CaptureSource, RoundedSource
from so8tqc.sources.compare import compare
from so8tqc.sources.converted.history import places_of
from so8tqc.sources.gated import GatedSource
from so8tqc.sources.hf import HFModel
from so8tqc.sources.protocol import LogitSource
from so8tqc.sources.seen import images_of

KL, TOP1, SECTIONS = "images.kl", "images.top1", "images.rope_sections"
_UINT32_ARRAY = struct.Struct("<IIQ")  # GGUF's type 9, of type 4 or 5, so many
_SHARE = 10.0
"""A hypothesis explains a difference that it makes so many times smaller."""

_SMALLEST = 1e-5
"""nats; a difference below this is not looked into."""


def apart(table: TokenTable) -> Apart | None:
    """Statistics of the tokens that no picture conditions, and of those that one does."""
    sees = table.sees
    if not sees.any():
        return None
    return Apart(
        text=_statistics(table.where(~sees)) if not sees.all() else None,
        images=_statistics(table.where(sees)),
    )


def _statistics(table: TokenTable) -> Statistics:
    return Statistics.model_validate(summarise(table))


def sections_checks(base: Path, names: Mapping[str, Path]) -> list[Check]:
    """``images.rope_sections``: a GGUF file shares rope out as the model does.

    Text gives the same angle to all sections, so that only pictures show them.

    Args:
        base: the reference's model directory, or a GGUF file.
        names: candidates.
    """
    if is_gguf(base) or not base.is_dir():
        return []
    wanted = _sections_of(open_checkpoint(base))
    if wanted is None:
        return []
    checks = []
    for name, path in names.items():
        if not is_gguf(path):
            continue
        stored = _stored_sections(path)
        found = [n for n in stored if n]
        checks.append(
            judge(
                SECTIONS,
                int(found != wanted),
                0,
                subject=name,
                detail=f"Rotary pairs for time, height and width: {found or 'not stated'}; the "
                f"model has {wanted}.",
            )
        )
    return checks


def _sections_of(checkpoint: Checkpoint) -> list[int] | None:
    """``mrope_section`` of a configuration; None for a rope of one axis."""
    text = checkpoint.config.get("text_config")
    for config in (text if isinstance(text, dict) else {}, checkpoint.config):
        for key in ("rope_parameters", "rope_scaling"):
            rope = config.get(key)
            if isinstance(rope, dict) and isinstance(rope.get("mrope_section"), list):
                return [int(n) for n in rope["mrope_section"]]
    return None


def _stored_sections(path: Path) -> tuple[int, ...]:
    values = key_values(path)
    for key, raw in values.items():
        if key.endswith(".rope.dimension_sections"):
            _, _, count = _UINT32_ARRAY.unpack_from(raw)
            return struct.unpack_from(f"<{count}i", raw, _UINT32_ARRAY.size)
    return ()


def mmproj_checks(
    mmproj: Path, base: Path, names: Mapping[str, Path], progress: Progress
) -> list[Check]:
    """A file of a vision tower against the reference's own: tensors, constants, width.

    Vision towers have no gates: that of the model before the bake is the same, and passes.

    Args:
        mmproj: the file.
        base: the reference's model directory.
        names: candidates; each GGUF among them must take as many features as it gives.
        progress: told about tensors.

    Raises:
        ModelError: no such file, one of another width, or a reference that is no directory.
        ToolError: the converter cannot say what becomes of the tower.
    """
    found = open_mmproj(mmproj)
    texts = [open_gguf(path) for path in names.values() if is_gguf(path)]
    for text in texts:
        require_same_width(found, text)
    if not texts or is_gguf(base):
        raise ModelError(
            "a vision tower's file is judged beside a GGUF candidate, against a model directory",
            where=str(mmproj),
        )
    checkpoint = open_checkpoint(base)
    with TemporaryDirectory(prefix="so8tqc-") as scratch:
        trace = Path(scratch) / "trace"
        trace_conversion(find_converter(), base, trace, arguments=[VISION])
        conversion = read_conversion(trace, places_of(checkpoint))
    unmapped = [name for name in checkpoint.tensors if is_of_vision(name)]
    of_text = TensorComparison(texts[0].architecture, unmapped=unmapped, traced=True)
    return vision_checks(checkpoint, Vision(found, conversion), texts[0], of_text, progress)


def diagnose_images(checks: Sequence[Check], tables: Mapping[str, TokenTable]) -> list[Diagnosis]:
    """Name what is wrong after pictures alone.

    Args:
        checks: all of the run.
        tables: candidate → its token table against the reference.
    """
    failed = {(c.subject, c.id) for c in checks if c.verdict is Verdict.FAIL}
    found = []
    for subject in dict.fromkeys(subject for subject, _ in failed):
        if (subject, SECTIONS) in failed:
            told = next(c for c in checks if (c.subject, c.id) == (subject, SECTIONS))
            found.append(_named("rope_sections", f"{subject}: {told.detail}"))
        elif (subject, KL) in failed and (said := _apart(tables.get(subject))) is not None:
            found.append(_named("wrong_on_images", f"{subject}: {said}"))
    return found


def _apart(table: TokenTable | None) -> str | None:
    """How far the two kinds of tokens are, where those after pictures are much farther."""
    if table is None or not table.sees.any() or table.sees.all():
        return None
    kl = table.columns["kl"]
    text, images = float(kl[~table.sees].mean()), float(kl[table.sees].mean())
    if images < _SHARE * text:
        return None
    return f"mean KL {images:.2e} nats after pictures, {text:.2e} before any"


def gates_off_images(
    base: Path, rotations: RotationSet, capture: Capture, to_gated: TokenTable | None
) -> list[Diagnosis]:
    """Whether the recorded model applied its gates to text positions alone.

    It is run so, and compared, where base plus gates agrees with the capture before pictures and
    not after them.

    Args:
        base: model directory.
        rotations: its gates.
        capture: what the trained model gave, its texts with their pictures.
        to_gated: the capture against base plus gates.
    """
    if to_gated is None or (said := _apart(to_gated)) is None:
        return []
    texts = [text for text in capture.texts if images_of(text.tokens) is not None]
    model = HFModel.load(base)
    sparing = GatedSource(model, rotations, "sparing", spare_pictures=True)
    try:
        pair = ("recorded", "sparing")
        sources: list[LogitSource] = [
            CaptureSource(capture, pair[0]),
            RoundedSource(sparing, capture.dtype),
        ]
        kl = float(compare(sources, [pair], texts)[pair].columns["kl"].mean())
    finally:
        sparing.close()
    before = float(to_gated.columns["kl"][to_gated.sees].mean())
    if before < _SMALLEST or kl * _SHARE > before:
        return []
    return [
        _named(
            "gates_off_images",
            f"{said}; with gates at text positions alone it is {kl:.2e}",
        )
    ]


def _named(code: str, said: str) -> Diagnosis:
    fault = DIAGNOSES[code]
    return Diagnosis(code=code, text=f"{fault.finding}: {said}.", remedy=fault.remedy)
