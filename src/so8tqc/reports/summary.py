"""The first screen of a report: verdict, the numbers that matter, what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from so8tqc.records import Check, Record, Verdict, overall
from so8tqc.reports import format as fmt

_STAGE_REMEDIES = {
    "bake": "Bake again from the base model, then run: so8tqc run CONFIG --from bake",
    "export": "Read the converter's log beside the GGUF, then run: so8tqc run CONFIG --from export",
    "quantize": "Check disk and memory, then run: so8tqc run CONFIG --from quantize",
    "calibrate": "Do not apply this temperature; fit it on more text (--data FILE).",
    "qc": "See the failed checks; for a quantized file a finer type is the usual remedy.",
    "longtext": "Open the plots of the failed case in longtext/ and compare both models' series.",
}


def summarise_run(name: str, records: Mapping[str, Record]) -> dict[str, Any]:
    """Everything the first screen shows, from the stages' records."""
    checks = [check for record in records.values() for check in record.checks]
    verdict = overall(checks)
    counts = {v: sum(check.verdict is v for check in checks) for v in Verdict}
    return {
        "name": name,
        "verdict": str(verdict),
        "sentence": f"{counts[Verdict.PASS]} checks passed, {counts[Verdict.FAIL]} failed, "
        f"{counts[Verdict.SKIP]} were skipped, in {len(records)} stages.",
        "headline": _headline(records),
        "next_steps": _next_steps(records),
        "stages": [_stage_row(stage, record) for stage, record in records.items()],
    }


def _headline(records: Mapping[str, Record]) -> list[dict[str, str]]:
    """At most four numbers: fidelity of the bake, effect, best quantized file, calibration."""
    items = []
    if qc := records.get("qc"):
        for check in qc.checks:
            if check.id == "kl.mean":
                items.append(_kl_item(check))
        effect = next((c for c in qc.checks if c.id == "effect.kl"), None)
        if effect is not None:
            items.append(
                {
                    "label": "Gate's effect",
                    "value": f"{fmt.number(effect.value)} nats",
                    "note": "mean KL from base to gated model",
                    "verdict": str(effect.verdict),
                }
            )
    if calibrate := records.get("calibrate"):
        items += _temperature_item(calibrate)
    return items


def _kl_item(check: Check) -> dict[str, str]:
    note = f"limit {fmt.number(check.limit)}"
    if check.noise_floor is not None:
        note += f", noise floor {fmt.number(check.noise_floor)}"
    if check.target is not None and not check.target_met:
        note += f"; absolute target {fmt.number(check.target)} not met"
    return {
        "label": f"KL to the gated model, {check.subject}",
        "value": f"{fmt.number(check.value)} nats",
        "note": note,
        "verdict": str(check.verdict),
    }


def _temperature_item(record: Record) -> list[dict[str, str]]:
    temperature = record.metrics.get("temperature")
    if not isinstance(temperature, (int, float)):
        return []
    significant = bool(record.metrics.get("significant"))
    note = "gain on held-out text is significant" if significant else "no significant gain: T = 1"
    return [
        {
            "label": "Temperature",
            "value": fmt.number(temperature),
            "note": note,
            "verdict": str(record.verdict),
        }
    ]


def _next_steps(records: Mapping[str, Record]) -> list[str]:
    steps: list[str] = []
    for stage, record in records.items():
        steps += [diagnosis.remedy for diagnosis in record.diagnosis]
        failed = [check for check in record.checks if check.verdict is Verdict.FAIL]
        if failed and not record.diagnosis:
            listed = ", ".join(f"{c.id} of {c.subject}" if c.subject else c.id for c in failed[:4])
            steps.append(f"{stage}: {listed}. {_STAGE_REMEDIES[stage]}")
    return list(dict.fromkeys(steps))


def _stage_row(stage: str, record: Record) -> dict[str, Any]:
    verdicts = [check.verdict for check in record.checks]
    return {
        "name": stage,
        "verdict": str(record.verdict),
        "passed": verdicts.count(Verdict.PASS),
        "failed": verdicts.count(Verdict.FAIL),
        "skipped": verdicts.count(Verdict.SKIP),
        "seconds": record.run.seconds,
    }
