"""A section for a model's README: the files of a run, what was measured of each, how to verify."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from so8tqc.record_kinds.calibrate import CalibrateMetrics
from so8tqc.record_kinds.qc import QCMetrics
from so8tqc.records import Check, FileRef, Record, Verdict, worst
from so8tqc.reports import format as fmt
from so8tqc.reports.templating import render
from so8tqc.wording import percent


class CardFile(NamedTuple):
    """One row of the card, all of it text but ``sha256``, which is also in the digest list."""

    name: str
    size: str
    kl: str
    interval: str
    top1: str
    temperature: str
    verdict: str
    sha256: str


def model_card(name: str, records: Mapping[str, Record]) -> str:
    """Markdown without a YAML header, to paste into a README; a pure function of the records.

    File names stand without their folders, which are nobody else's concern.
    """
    files = [_row(path, ref, records) for path, ref in _shipped(records)]
    qc = records.get("qc")
    return (
        render(
            "model_card.md.j2",
            name=name,
            files=files,
            verdict=str(worst(record.verdict for record in records.values())),
            failed=sorted({c.id for record in records.values() for c in record.checks if c.failed}),
            base=_named(records, "base", "reference"),
            rotations=_named(records, "rotations"),
            scope=_scope(qc) if qc else "",
            quantized=[file.name for file in files if file.name in _quantized(records)],
            version=next(iter(records.values())).versions.get("so8tqc", ""),
        ).strip()
        + "\n"
    )


def _shipped(records: Mapping[str, Record]) -> Iterator[tuple[str, FileRef]]:
    """The GGUF files of the run in the order of its stages, each once."""
    seen: set[str] = set()
    for stage in ("export", "quantize", "choose", "calibrate"):
        if stage not in records:
            continue
        for ref in records[stage].outputs.values():
            name = Path(ref.path).name
            if name.endswith(".gguf") and name not in seen:
                seen.add(name)
                yield name, ref


def _row(name: str, ref: FileRef, records: Mapping[str, Record]) -> CardFile:
    qc = records.get("qc")
    measured = QCMetrics.of(qc).candidates.get(name) if qc else None
    kl, top1 = (measured.kl_mean, measured.top1) if measured else (None, None)
    checks = [check for check in (qc.checks if qc else ()) if check.subject == name]
    divergence = next((check for check in checks if check.id == "kl.mean"), None)
    return CardFile(
        name=name,
        size=fmt.size(ref.bytes),
        kl=fmt.number(kl),
        interval=(fmt.interval(divergence.ci95) if divergence else "") or "–",
        top1="–" if top1 is None else percent(top1),
        temperature=_temperature(name, records),
        verdict=_verdict(checks),
        sha256=ref.sha256,
    )


def _verdict(checks: list[Check]) -> str:
    """The worst verdict of the checks of a file that count; – if it was not judged."""
    if not checks:
        return "–"
    verdict = worst(check.verdict for check in checks if not check.allowed)
    return "–" if verdict is Verdict.SKIP else str(verdict)


def _temperature(name: str, records: Mapping[str, Record]) -> str:
    """What to divide this file's logits by, or that it does so itself; – if it was not fitted."""
    calibrated = records.get("calibrate")
    if calibrated is None:
        return "–"
    found = CalibrateMetrics.of(calibrated)
    if found.temperature is None:
        return "–"
    value = f"{found.temperature:.3f}"
    applied = calibrated.outputs.get("calibrated")
    if applied is not None and Path(applied.path).name == name:
        norm = found.applied is not None and found.applied.how == "norm"
        return f"{value}, in the file" if norm else f"{value}, in its metadata"
    source = calibrated.inputs.get("gguf")
    return value if source is not None and Path(source.path).name == name else "–"


def _quantized(records: Mapping[str, Record]) -> set[str]:
    """Files that ``so8tqc verify`` can make again."""
    if "quantize" not in records:
        return set()
    return {Path(ref.path).name for ref in records["quantize"].outputs.values()}


def _scope(qc: Record) -> str:
    for found in QCMetrics.of(qc).candidates.values():
        if found.texts is not None and found.tokens is not None:
            return f"{found.texts:,} texts, {found.tokens:,} scored tokens"
    return ""


def _named(records: Mapping[str, Record], *names: str) -> str:
    """The name of an input (``org/name@commit``, or the last part of its path) with its digest."""
    for record in records.values():
        for name in names:
            if name in record.inputs:
                ref = record.inputs[name]
                return f"{ref.source or Path(ref.path).name} (sha256 {ref.sha256[:16]}…)"
    return ""
