"""What to do next: from failed checks and diagnoses, each with a command if there is one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from so8tqc.check_guide import GUIDE
from so8tqc.records import Check, Record, Verdict
from so8tqc.reports import format as fmt
from so8tqc.reports.tables import entries

_COARSE_TO_FINE = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
"""llama.cpp's usual steps of quality; other types have no neighbour that could be advised."""

_PLOTS = "Open the plots of the failed case and compare both models' series."
_CHECKS_NAMED = 4


class NextStep(NamedTuple):
    """One piece of advice: a sentence, and a command line or ""."""

    text: str
    command: str = ""


def next_steps(records: Mapping[str, Record]) -> list[NextStep]:
    """Remedies of diagnoses first; then what failed without one, by the file it failed for."""
    steps: list[NextStep] = []
    for stage, record in records.items():
        steps += [NextStep(f"{d.text} {d.remedy}") for d in record.diagnosis]
        failed = [check for check in record.checks if check.failed]
        for subject in dict.fromkeys(check.subject for check in failed):
            mine = [check for check in failed if check.subject == subject]
            if stage == "qc" and subject in _quantized(records):
                steps.append(_lost_too_much(records, subject, mine))
            elif not record.diagnosis:
                remedies = _remedies(stage, mine)
                steps.append(NextStep(f"{_named(mine, subject)} failed. {remedies}"))
    return list(dict.fromkeys(steps))


def _remedies(stage: str, failed: Iterable[Check]) -> str:
    """What to do about the checks of one file that failed in one stage, each remedy once."""
    unknown = _PLOTS if stage == "longtext" else "See the failed checks."
    found = (GUIDE[check.id].remedy if check.id in GUIDE else unknown for check in failed)
    return " ".join(text if text[-1] in ".)" else f"{text}." for text in dict.fromkeys(found))


def _lost_too_much(
    records: Mapping[str, Record], subject: str, failed: Iterable[Check]
) -> NextStep:
    """A quantized file failed: name a file of this run that passed, and a type worth a try."""
    text = f"{_named(failed, subject)} failed."
    sizes = _sizes(records)
    passed = [name for name in sizes if _passes(records["qc"], name)]
    if passed:
        text += f" {min(passed, key=lambda name: sizes[name])} of this run passed."
    command = _finer_type(records, subject)
    if command:
        text += " Try a finer type:"
    elif not passed:
        text += " There is no finer type to try: do not ship it, or judge by limits of your own."
    return NextStep(text, command)


def _finer_type(records: Mapping[str, Record], subject: str) -> str:
    """Command that makes the next type which is finer than all that failed, "" if none is."""
    files, source = _quantized(records), records["quantize"].inputs.get("gguf")
    failed = {str(f.get("type")) for name, f in files.items() if not _passes(records["qc"], name)}
    if source is None or not failed <= set(_COARSE_TO_FINE):
        return ""
    finest = max(_COARSE_TO_FINE.index(kind) for kind in failed)
    made = {str(file.get("type")) for file in files.values()}
    untried = [kind for kind in _COARSE_TO_FINE[finest + 1 :] if kind not in made]
    if not untried:
        return ""
    out = Path(str(files[subject].get("path", subject))).parent
    return f"so8tqc quantize {source.path} --type {untried[0]} --out {out}"


def _named(checks: Iterable[Check], subject: str) -> str:
    """``kl.mean 0.1217 (≤ 0.08) of FILE``."""
    listed = list(checks)
    parts = [f"{c.id} {fmt.number(c.value)} ({fmt.limit(c)})" for c in listed[:_CHECKS_NAMED]]
    if len(listed) > _CHECKS_NAMED:
        parts.append(f"{len(listed) - _CHECKS_NAMED} more")
    return ", ".join(parts) + (f" of {subject}" if subject else "")


def _passes(qc: Record, subject: str) -> bool:
    mine = [check for check in qc.checks if check.subject == subject]
    return any(c.verdict is Verdict.PASS for c in mine) and not any(c.failed for c in mine)


def _quantized(records: Mapping[str, Record]) -> dict[str, dict[str, object]]:
    """File name → its metrics, for the files that both quantize and qc know."""
    if "quantize" not in records or "qc" not in records:
        return {}
    judged = {check.subject for check in records["qc"].checks}
    return {k: v for k, v in entries(records["quantize"], "files").items() if k in judged}


def _sizes(records: Mapping[str, Record]) -> dict[str, int]:
    """Name → bytes of the GGUF files of this run, exported and quantized."""
    return {
        Path(output.path).name: output.bytes
        for stage in ("quantize", "export")
        if stage in records
        for output in records[stage].outputs.values()
    }
