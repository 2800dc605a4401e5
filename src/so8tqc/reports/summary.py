"""The first screen of a report: verdict, what was tested, the numbers that matter, what next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from so8tqc.records import Check, FileRef, Record, Verdict, worst
from so8tqc.reports import format as fmt
from so8tqc.reports.advice import next_steps
from so8tqc.reports.tables import entries, layers


def summarise_run(name: str, records: Mapping[str, Record]) -> dict[str, Any]:
    """Everything the first screen shows, from the stages' records.

    Returns:
        ``name``, ``verdict`` (the worst of the stages), ``sentence``, ``tested`` (label → text),
        ``headline`` (cards: label, value, note, verdict), ``next_steps`` (text, command),
        ``stages`` (one row each), ``seconds`` (of all stages).
    """
    return {
        "name": name,
        "verdict": str(worst(record.verdict for record in records.values())),
        "sentence": _sentence(records),
        "tested": _tested(records),
        "headline": _headline(records),
        "next_steps": [step._asdict() for step in next_steps(records)],
        "stages": [stage_row(stage, record) for stage, record in records.items()],
        "seconds": sum(record.run.seconds for record in records.values()),
    }


def _sentence(records: Mapping[str, Record]) -> str:
    """``82 checks in 6 stages: 79 passed, 3 failed.``"""
    checks = [check for record in records.values() for check in record.checks]
    if not checks:
        return "Nothing was checked."
    rows = [stage_row(stage, record) for stage, record in records.items()]
    words = ("passed", "failed", "allowed", "skipped")
    parts = [f"{n} {word}" for word in words if (n := sum(row[word] for row in rows))]
    where = f" in {fmt.counted(len(records), 'stage')}" if len(records) > 1 else ""
    return f"{fmt.counted(len(checks), 'check')}{where}: {', '.join(parts)}."


def _tested(records: Mapping[str, Record]) -> dict[str, str]:
    """What the verdict is about: models, rotations, files, text, limits."""
    tested: dict[str, str] = {}
    if base := _input(records, "base", "reference"):
        tested["base model"] = _file(base)
    if rotations := _input(records, "rotations"):
        tested["rotations"] = Path(rotations.path).name + _blocks(records)
    candidates: dict[str, dict[str, Any]] = {}
    if qc := records.get("qc"):
        candidates = entries(qc, "candidates")
        # without a model run (level files) the checks alone know the candidates
        named = candidates or dict.fromkeys(check.subject for check in qc.checks if check.subject)
        tested["under test"] = ", ".join(named)
    elif quantized := records.get("quantize"):
        tested["under test"] = ", ".join(entries(quantized, "files"))
    elif calibrated := _input(records, "gguf", "model"):
        tested["under test"] = _file(calibrated)
    text = []
    for metrics in list(candidates.values())[:1]:
        if "texts" in metrics and "tokens" in metrics:
            text.append(_extent(int(metrics["texts"]), "text", int(metrics["tokens"])))
    if long := records.get("longtext"):
        cases = entries(long, "cases")
        tokens = sum(int(case.get("tokens", 0)) for case in cases.values())
        text += [_extent(len(cases), "long text", tokens)] if cases else []
    tested["text"] = "; ".join(text)
    if qc and (profile := qc.config.get("profile")):
        tested["limits"] = f"profile {profile}"
    return {label: value for label, value in tested.items() if value}


def _input(records: Mapping[str, Record], *names: str) -> FileRef | None:
    """The first stage's input of one of these names."""
    for record in records.values():
        for name in names:
            if name in record.inputs:
                return record.inputs[name]
    return None


def _extent(texts: int, noun: str, tokens: int) -> str:
    return f"{fmt.counted(texts, noun)}, {fmt.counted(tokens, 'token')}"


def _file(ref: FileRef) -> str:
    return f"{Path(ref.path).name}, {fmt.size(ref.bytes)}"


def _blocks(records: Mapping[str, Record]) -> str:
    rows = layers(records["bake"]) if "bake" in records else []
    blocks = sum(int(row.get("blocks", 0)) for row in rows)
    return f", {blocks:,} blocks in {len(rows)} layers" if blocks else ""


def _headline(records: Mapping[str, Record]) -> list[dict[str, str]]:
    """The bake's fidelity and top tokens, the file furthest away, the one to take, temperature."""
    items: list[dict[str, str]] = []
    if qc := records.get("qc"):
        divergences = [c for c in qc.checks if c.id == "kl.mean" and c.value is not None]
        if divergences:
            first = next((c for c in divergences if c.noise_floor is not None), divergences[0])
            items.append(_fidelity_card(first, qc))
            items += [
                _top_card(c) for c in qc.checks if (c.id, c.subject) == ("kl.top1", first.subject)
            ]
            others = [check for check in divergences if check is not first]
            if others:
                items.append(_furthest_card(others, qc))
    if choose := records.get("choose"):
        items += _choice_cards(choose)
    if calibrate := records.get("calibrate"):
        items += _temperature_cards(calibrate)
    return items


def _fidelity_card(check: Check, qc: Record) -> dict[str, str]:
    parts = _interval(check)
    if check.noise_floor is not None:
        parts.append(f"rounding alone costs {_short(check.noise_floor)}")
    effect = next((c for c in qc.checks if c.id == "effect.kl"), None)
    if effect is not None:
        parts.append(f"the gates change {_short(effect.value)} nats")
    if check.target is not None and not check.target_met:
        parts.append(f"absolute target {_short(check.target)} not met")
    return _card(f"Mean KL, {check.subject}", f"{_short(check.value)} nats", parts, check.verdict)


def _top_card(check: Check) -> dict[str, str]:
    parts = []
    if check.ci95 is not None:
        parts.append(f"95 % interval {fmt.percent(check.ci95[0])} … {fmt.percent(check.ci95[1])}")
    if check.limit is not None:
        parts.append(f"at least {fmt.percent(check.limit)} is asked for")
    value = "–" if check.value is None else fmt.percent(check.value)
    return _card(f"Same top token, {check.subject}", value, parts, check.verdict)


def _furthest_card(checks: list[Check], qc: Record) -> dict[str, str]:
    """A failed file before one that passed, then the one with the larger KL."""
    worst = max(checks, key=lambda c: (c.verdict is Verdict.FAIL, c.value or 0.0))
    parts = _interval(worst)
    top = next((c for c in qc.checks if (c.id, c.subject) == ("kl.top1", worst.subject)), None)
    if top is not None and top.value is not None:
        parts.append(f"same top token {fmt.percent(top.value)}")
    if len(checks) > 1:
        parts.append(f"the furthest of {len(checks)} files")
    return _card(f"Mean KL, {worst.subject}", f"{_short(worst.value)} nats", parts, worst.verdict)


def _choice_cards(record: Record) -> list[dict[str, str]]:
    rows = entries(record, "rows")
    name = str(record.metrics.get("recommended"))
    if (row := rows.get(name)) is None:
        return []
    parts = [
        f"{fmt.size(row['bytes'])}, of {fmt.counted(len(rows), 'file')} compared",
        f"mean KL {_short(row['kl_mean'])} nats",
        f"same top token {fmt.percent(row['top1'])}",
    ]
    return [_card("Recommended", name, parts, record.verdict)]


def _temperature_cards(record: Record) -> list[dict[str, str]]:
    temperature = record.metrics.get("temperature")
    if not isinstance(temperature, (int, float)):
        return []
    parts = ["the gain on held-out text is significant"]
    if not record.metrics.get("significant"):
        parts = ["no significant gain on held-out text, so none is applied"]
    sides = [record.metrics.get(key) for key in ("before", "after")]
    errors = [side.get("ece") for side in sides if isinstance(side, dict)]
    numbers = [f"{value:.4f}" for value in errors if isinstance(value, float)]
    if len(numbers) == len(sides):
        parts.append(f"ECE {' → '.join(numbers)}")
    return [_card("Temperature", fmt.number(temperature), parts, record.verdict)]


def _card(label: str, value: str, parts: list[str], verdict: Verdict) -> dict[str, str]:
    return {"label": label, "value": value, "note": "; ".join(parts), "verdict": str(verdict)}


def _interval(check: Check) -> list[str]:
    parts = []
    if check.ci95 is not None:
        parts.append(f"95 % interval {_short(check.ci95[0])} … {_short(check.ci95[1])}")
    if check.limit is not None:
        parts.append(f"limit {_short(check.limit)}")
    return parts


def _short(value: float | None) -> str:
    """Three digits: enough for a first look."""
    return "–" if value is None else f"{value:.3g}"


def stage_row(stage: str, record: Record) -> dict[str, Any]:
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
