"""The first screen of a report: verdict, what was tested, the numbers that matter, what next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from so8tqc.record_kinds.bake import BakeMetrics
from so8tqc.record_kinds.calibrate import CalibrateMetrics
from so8tqc.record_kinds.choose import ChooseMetrics
from so8tqc.record_kinds.longtext import LongTextMetrics
from so8tqc.record_kinds.qc import Candidate, QCMetrics
from so8tqc.record_kinds.quantize import QuantizeMetrics
from so8tqc.record_kinds.run import StageRow
from so8tqc.records import Check, FileRef, Record, Verdict, worst
from so8tqc.reports import format as fmt
from so8tqc.reports.advice import next_steps
from so8tqc.reports.language import message, say
from so8tqc.wording import percent

_OUTCOMES = {
    "passed": message("{count} passed"),
    "failed": message("{count} failed"),
    "allowed": message("{count} allowed"),
    "skipped": message("{count} skipped"),
}


class Card(TypedDict):
    """A number that matters, what it is of, and what to know of it."""

    label: str
    value: str
    note: str
    verdict: str


class Advice(TypedDict):
    """A sentence, and a command line or ""."""

    text: str
    command: str


class Summary(TypedDict):
    """What the first screen shows.

    ``verdict`` is the worst of the stages, ``tested`` goes from labels to texts, ``seconds`` are
    those of all stages.
    """

    name: str
    verdict: str
    sentence: str
    tested: dict[str, str]
    headline: list[Card]
    next_steps: list[Advice]
    stages: list[StageRow]
    seconds: float


def summarise_run(name: str, records: Mapping[str, Record], note: str = "") -> Summary:
    """Everything the first screen shows, from the stages' records.

    Args:
        name: of the run.
        records: stage → record.
        note: a sentence of the run's own configuration, shown with what was tested.
    """
    return {
        "name": name,
        "verdict": str(worst(record.verdict for record in records.values())),
        "sentence": _sentence(records),
        "tested": _tested(records) | ({say("note"): say(note)} if note else {}),
        "headline": _headline(records),
        "next_steps": [
            {"text": step.text, "command": step.command} for step in next_steps(records)
        ],
        "stages": [stage_row(stage, record) for stage, record in records.items()],
        "seconds": sum(record.run.seconds for record in records.values()),
    }


def _sentence(records: Mapping[str, Record]) -> str:
    """``82 checks in 6 stages: 79 passed, 3 failed.``"""
    checks = [check for record in records.values() for check in record.checks]
    if not checks:
        return say("Nothing was checked.")
    counts = Counter[str]()
    for stage, record in records.items():
        row = stage_row(stage, record)
        counts.update(
            passed=row["passed"],
            failed=row["failed"],
            allowed=row["allowed"],
            skipped=row["skipped"],
        )
    parts = [say(words, count=counts[key]) for key, words in _OUTCOMES.items() if counts[key]]
    counted, outcomes = fmt.counted(len(checks), "check"), say(", ").join(parts)
    if len(records) == 1:
        return say("{checks}: {outcomes}.", checks=counted, outcomes=outcomes)
    stages = fmt.counted(len(records), "stage")
    return say(
        "{checks} in {stages}: {outcomes}.", checks=counted, stages=stages, outcomes=outcomes
    )


def _tested(records: Mapping[str, Record]) -> dict[str, str]:
    """What the verdict is about: models, rotations, files, text, limits."""
    tested: dict[str, str] = {}
    if base := _input(records, "base", "reference"):
        tested[say("base model")] = _file(base)
    if rotations := _input(records, "rotations"):
        tested[say("rotations")] = Path(rotations.path).name + _blocks(records)
    candidates: dict[str, Candidate] = {}
    if qc := records.get("qc"):
        candidates = QCMetrics.of(qc).candidates
        # without a model run (level files) the checks alone know the candidates
        named = candidates or dict.fromkeys(check.subject for check in qc.checks if check.subject)
        tested[say("under test")] = say(", ").join(named)
    elif quantized := records.get("quantize"):
        tested[say("under test")] = say(", ").join(QuantizeMetrics.of(quantized).files)
    elif calibrated := _input(records, "gguf", "model"):
        tested[say("under test")] = _file(calibrated)
    text = []
    for first in list(candidates.values())[:1]:
        if first.texts is not None and first.tokens is not None:
            text.append(_extent(first.texts, "text", first.tokens))
    if long := records.get("longtext"):
        cases = LongTextMetrics.of(long).cases
        tokens = sum(case.tokens or 0 for case in cases.values())
        text += [_extent(len(cases), "long text", tokens)] if cases else []
    tested[say("text")] = say("; ").join(text)
    if qc and (profile := qc.config.get("profile")):
        tested[say("limits")] = say("profile {profile}", profile=profile)
    return {label: value for label, value in tested.items() if value}


def _input(records: Mapping[str, Record], *names: str) -> FileRef | None:
    """The first stage's input of one of these names."""
    for record in records.values():
        for name in names:
            if name in record.inputs:
                return record.inputs[name]
    return None


def _extent(texts: int, noun: str, tokens: int) -> str:
    return say(", ").join((fmt.counted(texts, noun), fmt.counted(tokens, "token")))


def _file(ref: FileRef) -> str:
    return say(", ").join((Path(ref.path).name, fmt.size(ref.bytes)))


def _blocks(records: Mapping[str, Record]) -> str:
    rows = BakeMetrics.of(records["bake"]).layers if "bake" in records else []
    blocks = sum(row.blocks or 0 for row in rows)
    if not blocks:
        return ""
    return say(", {blocks} blocks in {layers} layers", blocks=f"{blocks:,}", layers=len(rows))


_CARDS = 3


def _headline(records: Mapping[str, Record]) -> list[Card]:
    """The three numbers that matter most, of those that were measured.

    The bake's fidelity; the file that failed, or else the one to take; the temperature. Where one
    is missing, the file furthest from the reference and the share of top tokens fill in.
    """
    first: list[Card] = []
    rest: list[Card] = []
    if qc := records.get("qc"):
        divergences = [c for c in qc.checks if c.id == "kl.mean" and c.value is not None]
        if divergences:
            bake = next((c for c in divergences if c.noise_floor is not None), divergences[0])
            first.append(_fidelity_card(bake, qc))
            if others := [check for check in divergences if check is not bake]:
                failed = [check for check in others if _failed(qc, check.subject)]
                card = _furthest_card(failed or others, len(others), qc)
                (first if failed else rest).append(card)
            rest += [_top_card(c) for c in _of(qc, "kl.top1", bake.subject)]
    if choose := records.get("choose"):
        first += _choice_cards(choose)
    if calibrate := records.get("calibrate"):
        first += _temperature_cards(calibrate)
    return [*first, *rest][:_CARDS]


def _of(record: Record, check_id: str, subject: str) -> list[Check]:
    return [c for c in record.checks if (c.id, c.subject) == (check_id, subject)]


def _failed(record: Record, subject: str) -> list[Check]:
    return [check for check in record.checks if check.subject == subject and check.failed]


def _fidelity_card(check: Check, qc: Record) -> Card:
    parts = _interval(check)
    if check.noise_floor is not None:
        parts.append(say("rounding alone costs {floor}", floor=_short(check.noise_floor)))
    effect = next((c for c in qc.checks if c.id == "effect.kl"), None)
    if effect is not None:
        parts.append(say("the gates change {effect} nats", effect=_short(effect.value)))
    if check.target is not None and not check.target_met:
        parts.append(say("absolute target {target} not met", target=_short(check.target)))
    return _divergence_card(check, parts, check.verdict)


def _top_card(check: Check) -> Card:
    parts = []
    if check.ci95 is not None:
        low, high = map(percent, check.ci95)
        parts.append(say("95 % interval {interval}", interval=f"{low} … {high}"))
    if check.limit is not None:
        parts.append(say("at least {limit} is asked for", limit=percent(check.limit)))
    value = "–" if check.value is None else percent(check.value)
    label = say("Same top token, {name}", name=check.subject)
    return _card(label, value, parts, check.verdict)


def _furthest_card(checks: list[Check], files: int, qc: Record) -> Card:
    """The file with the largest KL; what failed for it, if anything did."""
    furthest = max(checks, key=lambda c: c.value or 0.0)
    parts = _interval(furthest)
    for top in _of(qc, "kl.top1", furthest.subject):
        if top.value is not None:
            parts.append(say("same top token {share}", share=percent(top.value)))
    failed = _failed(qc, furthest.subject)
    if failed:
        parts.append(say("failed: {checks}", checks=say(", ").join(check.id for check in failed)))
    elif files > 1:
        parts.append(say("the furthest of {files}", files=fmt.counted(files, "file")))
    return _divergence_card(furthest, parts, Verdict.FAIL if failed else furthest.verdict)


def _divergence_card(check: Check, parts: list[str], verdict: Verdict) -> Card:
    label = say("Mean KL, {name}", name=check.subject)
    return _card(label, say("{value} nats", value=_short(check.value)), parts, verdict)


def _choice_cards(record: Record) -> list[Card]:
    found = ChooseMetrics.of(record)
    name = found.recommended or ""
    if (row := found.rows.get(name)) is None:
        return []
    files = fmt.counted(len(found.rows), "file")
    parts = [
        say("{size}, of {files} compared", size=fmt.size(row["bytes"]), files=files),
        say("mean KL {kl} nats", kl=_short(row["kl_mean"])),
        say("same top token {share}", share=percent(row["top1"])),
    ]
    return [_card(say("Recommended"), name, parts, record.verdict)]


def _temperature_cards(record: Record) -> list[Card]:
    found = CalibrateMetrics.of(record)
    if found.temperature is None:
        return []
    parts = [say("the gain on held-out text is significant")]
    if not found.significant:
        parts = [say("no significant gain on held-out text, so none is applied")]
    before, after = found.before.get("ece"), found.after.get("ece")
    if before is not None and after is not None:
        parts.append(f"ECE {before:.4f} → {after:.4f}")
    return [_card(say("Temperature"), fmt.number(found.temperature), parts, record.verdict)]


def _card(label: str, value: str, parts: list[str], verdict: Verdict) -> Card:
    return {"label": label, "value": value, "note": say("; ").join(parts), "verdict": str(verdict)}


def _interval(check: Check) -> list[str]:
    parts = []
    if check.ci95 is not None:
        interval = f"{_short(check.ci95[0])} … {_short(check.ci95[1])}"
        parts.append(say("95 % interval {interval}", interval=interval))
    if check.limit is not None:
        parts.append(say("limit {limit}", limit=_short(check.limit)))
    return parts


def _short(value: float | None) -> str:
    """Three digits: enough for a first look."""
    return "–" if value is None else f"{value:.3g}"


def stage_row(stage: str, record: Record) -> StageRow:
    """A stage's verdict, how many of its checks ended how, and its seconds."""
    verdicts = [check.verdict for check in record.checks]
    return {
        "name": stage,
        "verdict": str(record.verdict),
        "passed": verdicts.count(Verdict.PASS),
        "failed": sum(check.failed for check in record.checks),
        "allowed": sum(c.verdict is Verdict.FAIL and c.allowed for c in record.checks),
        "skipped": verdicts.count(Verdict.SKIP),
        "seconds": record.run.seconds,
        "reused": record.run.reused,
    }
