"""Audit: a GGUF file that somebody else made, beside the model that it claims to be.

The judgement is that of ``qc`` at level ``files``; what is added says what the file is and how it
was quantized.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from so8tqc.closure import versions_of
from so8tqc.config import AuditConfig, QCConfig
from so8tqc.disk.digests import file_ref
from so8tqc.disk.locks import claim_folder, exclusive
from so8tqc.errors import InputError
from so8tqc.gguf.file import GGUFFile, is_gguf, open_gguf
from so8tqc.progress import SILENT, Progress
from so8tqc.record_kinds.audit import AuditedFile, AuditMetrics, How, TypeUse
from so8tqc.record_kinds.qc import QCMetrics
from so8tqc.record_kinds.tensors import TensorRow
from so8tqc.records import FileRef, Record, Stopwatch
from so8tqc.services.qc.service import qc
from so8tqc.services.tensors.measure import INTEGERS, PLAIN
from so8tqc.sources.inputs.hub import with_local_paths

_OF_ITSELF = ("general.", "quantize.")
_LONGEST = 120
_BY_VERDICT: dict[str, How] = {
    "plain": "plain",
    "nearest": "nearest",
    "importance": "importance",
    "compensated": "compensated",
}


@exclusive(claim_folder)
def audit(config: AuditConfig, progress: Progress = SILENT) -> Record:
    """Say what a GGUF file is, how it was quantized, and what of it cannot be explained.

    Record metrics: :class:`so8tqc.record_kinds.audit.AuditMetrics`.

    Raises:
        InputError: the file is no GGUF, or nothing of it can be judged beside the base.
    """
    watch = Stopwatch()
    if not is_gguf(config.file):
        raise InputError("an audit is of a GGUF file", where=str(config.file))
    config = with_local_paths(config, progress)
    judged = qc(_as_qc(config), progress)
    found = QCMetrics.of(judged)
    gguf = open_gguf(config.file)
    rows = [row for of_one in found.tensors.values() for row in of_one]
    metrics = AuditMetrics(
        file=_facts(gguf),
        how=_how(rows),
        types=_types(gguf, rows),
        tensors=rows,
        survival=next(iter(found.survival.values()), {}),
    )
    return Record(
        kind="audit",
        verdict=judged.verdict,
        checks=judged.checks,
        metrics=metrics.as_json(),
        diagnosis=judged.diagnosis,
        notices=judged.notices,
        inputs=_inputs(config),
        config=config.model_dump(mode="json"),
        versions=versions_of(__name__),
        run=watch.info(),
    )


def _as_qc(config: AuditConfig) -> QCConfig:
    return QCConfig(
        reference=config.base,
        candidates=(config.file,),
        rotations=config.rotations,
        rotation_options=config.rotation_options,
        out=config.out,
        level="files",
        fail_on=config.fail_on,
        allow=config.allow,
    )


def _facts(gguf: GGUFFile) -> AuditedFile:
    says = {
        key: text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
        for key, value in gguf.fields.items()
        if key.startswith(_OF_ITSELF) and isinstance(value, (str, int, float))
        for text in [str(value)]
    }
    return AuditedFile(
        name=gguf.path.name,
        architecture=gguf.architecture,
        declared=gguf.file_type,
        bytes=gguf.size,
        weights=sum(tensor.elements for tensor in gguf.tensors.values()),
        bits=gguf.bits_per_weight,
        says=says,
    )


def _how(rows: Sequence[TensorRow]) -> How:
    """By what most of the quantized weights that an honest encoder explains were made."""
    quantized = [row for row in rows if row.type not in PLAIN | INTEGERS]
    if not quantized:
        return "rounded"
    weights = Counter[How]()
    for row in quantized:
        if row.verdict in _BY_VERDICT:
            weights[_BY_VERDICT[row.verdict]] += row.elements
    return weights.most_common(1)[0][0] if weights else "unexplained"


def _types(gguf: GGUFFile, rows: Sequence[TensorRow]) -> dict[str, TypeUse]:
    verdicts = {row.name: row.verdict for row in rows}
    found = {}
    for type_ in gguf.types:
        its = [tensor for tensor in gguf.tensors.values() if tensor.type == type_]
        weights = sum(tensor.elements for tensor in its)
        found[type_] = TypeUse(
            tensors=len(its),
            weights=weights,
            bits=8.0 * sum(tensor.bytes for tensor in its) / weights,
            verdicts=dict(Counter(verdicts.get(t.name, "not looked at") for t in its)),
        )
    return dict(sorted(found.items(), key=lambda item: -item[1].weights))


def _inputs(config: AuditConfig) -> dict[str, FileRef]:
    inputs = {"file": file_ref(config.file), "base": file_ref(config.base)}
    if config.rotations is not None:
        inputs["rotations"] = file_ref(config.rotations)
    for i, path in enumerate(config.rotation_options.adapters):
        inputs[f"adapter_{i + 1}"] = file_ref(path)
    return inputs
