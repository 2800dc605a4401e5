"""What to do next: from failed checks and diagnoses, each with a command if there is one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from so8tqc.check_guide import GUIDE
from so8tqc.record_kinds.calibrate import CalibrateMetrics
from so8tqc.record_kinds.choose import ChooseMetrics
from so8tqc.record_kinds.quantize import QuantizedFile, QuantizeMetrics
from so8tqc.records import Check, Diagnosis, Record, Verdict
from so8tqc.reports import commands
from so8tqc.reports import format as fmt
from so8tqc.reports.diagnoses import divided, finding
from so8tqc.reports.language import message, say

_COARSE_TO_FINE = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
"""llama.cpp's usual steps of quality; other types have no neighbour that could be advised."""

_PLOTS = message("Open the plots of the failed case and compare both models' series.")
_CHECKS = message("See the failed checks.")
_CHECKS_NAMED = 4
_ENDS = ".)。）"


class NextStep(NamedTuple):
    """One piece of advice: a sentence, and a command line or ""."""

    text: str
    command: str = ""


_WEIGHT_CODES = frozenset({"foreign_edit", "non_finite"})
"""Faults of single tensors that are no layer's: baking again mends them, too."""

_BAKE_FLAGS = {
    "non_finite": ("--baked-dtype", "float32"),
    "storage_rounding": ("--baked-dtype", "float32"),
    "non_orthogonal": ("--orthogonalize", "polar"),
}
"""What a second bake must be told, by the diagnosis of the first."""


def next_steps(records: Mapping[str, Record]) -> list[NextStep]:
    """Remedies of diagnoses first, then what failed without one; if nothing did, what to ship."""
    steps: list[NextStep] = []
    for stage, record in records.items():
        failed = [check for check in record.checks if check.failed]
        steps += [
            _mend(diagnosis, records)
            for diagnosis in record.diagnosis
            if not _is_loss(diagnosis, stage, records)
        ]
        for subject in dict.fromkeys(check.subject for check in failed):
            mine = [check for check in failed if check.subject == subject]
            if stage == "qc" and subject in _quantized(records):
                steps.append(_lost_too_much(records, subject, mine))
            elif not record.diagnosis:
                steps.append(_failed(stage, records, mine))
            if stage == "qc" and _only_logits(mine):
                steps += _where(record, subject)
    return _filled_in(list(dict.fromkeys(steps))) or _ship(records)


_OF_LOGITS = ("kl.", "logits.")
_OF_FILES = ("structure.", "algebra.", "tensors.", "rotation.")


def _only_logits(failed: Iterable[Check]) -> bool:
    """Whether a file's logits are wrong, and nothing in the file itself says why."""
    ids = [check.id for check in failed]
    return any(i.startswith(_OF_LOGITS) for i in ids) and not any(
        i.startswith(_OF_FILES) for i in ids
    )


def _where(record: Record, subject: str) -> list[NextStep]:
    """The command that finds the layer and the operation, where there is one."""
    found = commands.locate(record, subject)
    text = say("See in which layer and operation {name} parts from the reference:", name=subject)
    return [NextStep(text, found)] if found else []


def _filled_in(steps: list[NextStep]) -> list[NextStep]:
    """No step shows a command to be filled in where one that is filled in stands beside it."""
    known = {name for step in steps for name in commands.named(step.command)}
    return [
        NextStep(_introducing(commands.without_placeholders(text), command), command)
        if command or commands.named(text) & known
        else NextStep(text)
        for text, command in steps
    ]


def _introducing(text: str, command: str) -> str:
    """A sentence that ends as one does, in front of a command or alone."""
    if text[-1:] in (*_ENDS, ":", "："):
        return text
    return f"{text}:" if command else say("{text}.", text=text)


def _is_loss(diagnosis: Diagnosis, stage: str, records: Mapping[str, Record]) -> bool:
    """Whether it says that a quantized file lost too much, which a step of its own advises on."""
    about = any(diagnosis.text.startswith(f"{name} ") for name in _quantized(records))
    return stage == "qc" and about and diagnosis.code == "storage_rounding"


def _mend(diagnosis: Diagnosis, records: Mapping[str, Record]) -> NextStep:
    """A diagnosis with its remedy; what is wrong in the weights is mended by another bake."""
    words, made = divided(diagnosis.remedy)
    text = say(" ").join((finding(diagnosis), say(words)))
    if made:
        return NextStep(text, made)
    in_weights = diagnosis.layers or diagnosis.code in _WEIGHT_CODES
    in_weights = in_weights and "so8tqc export" not in diagnosis.remedy  # the bake may be right
    extra = _BAKE_FLAGS.get(diagnosis.code, ())
    return NextStep(text, commands.bake_again(records, *extra) if in_weights else "")


def _failed(stage: str, records: Mapping[str, Record], failed: list[Check]) -> NextStep:
    """Checks of one file that failed, and nothing explains."""
    said = say("{checks} failed.", checks=_named(failed, failed[0].subject))
    return NextStep(say(" ").join((said, _remedies(stage, failed))), _again(stage, records))


def _again(stage: str, records: Mapping[str, Record]) -> str:
    """The command that does a stage's work once more, "" where that would not help."""
    record = records[stage]
    match stage:
        case "bake":
            return commands.bake_again({"bake": record})
        case "export":
            return commands.export_again(record)
        case "quantize":
            return commands.quantize_again(record)
        case "calibrate":
            return commands.calibrate_again(record, "--data", "builtin:calibration")
        case _:
            return ""


def _ship(records: Mapping[str, Record]) -> list[NextStep]:
    """Advice where nothing failed: the file to ship, how others can prove it, its temperature."""
    steps = []
    files = _quantized(records)
    recommended = ChooseMetrics.of(records["choose"]).recommended if "choose" in records else None
    sizes = _sizes(records)
    passed = [name for name in files if _passes(records["qc"], name)]
    named = [
        name
        for name in passed
        if recommended is not None and recommended in (name, files[name].type)
    ]
    chosen = (named or sorted(passed, key=sizes.__getitem__) or [""])[0]
    if chosen:
        why = say("recommended") if named else say("the smallest file that passed")
        path = files[chosen].path or chosen
        steps.append(
            NextStep(
                say(
                    "Ship {name} ({why}) with the record beside it: so it can be made again and "
                    "compared, tensor by tensor.",
                    name=chosen,
                    why=why,
                ),
                commands.command("verify", path),
            )
        )
    if calibrate := records.get("calibrate"):
        found = CalibrateMetrics.of(calibrate)
        if found.significant and found.temperature is not None:
            steps.append(_apply_temperature(calibrate, found.temperature))
    return steps


def _apply_temperature(record: Record, fitted: float) -> NextStep:
    temperature = fmt.number(fitted)
    name = Path(str(record.config.get("gguf", "the file"))).name
    if record.config.get("apply", "none") != "none":
        return NextStep(
            say(
                "Serve the copy of {name} that has temperature {temperature} applied.",
                name=name,
                temperature=temperature,
            )
        )
    return NextStep(
        say(
            "Serve {name} at temperature {temperature}, or write it into a copy of the file:",
            name=name,
            temperature=temperature,
        ),
        commands.calibrate_again(record, "--apply", "metadata"),
    )


def _remedies(stage: str, failed: Iterable[Check]) -> str:
    """What to do about the checks of one file that failed in one stage, each remedy once."""
    unknown = _PLOTS if stage == "longtext" else _CHECKS
    found = (GUIDE[check.id].remedy if check.id in GUIDE else unknown for check in failed)
    texts = (say(text) for text in dict.fromkeys(found))
    return say(" ").join(text if text[-1] in _ENDS else say("{text}.", text=text) for text in texts)


def _lost_too_much(
    records: Mapping[str, Record], subject: str, failed: Iterable[Check]
) -> NextStep:
    """A quantized file failed: name a file of this run that passed, and a type worth a try."""
    parts = [say("{checks} failed.", checks=_named(failed, subject))]
    sizes = _sizes(records)
    passed = [name for name in sizes if _passes(records["qc"], name)]
    if passed:
        smallest = min(passed, key=lambda name: sizes[name])
        parts.append(say("{name} of this run passed.", name=smallest))
    command = _finer_type(records, subject)
    if command:
        parts.append(say("Try a finer type:"))
    elif not passed:
        parts.append(
            say("There is no finer type to try: do not ship it, or judge by limits of your own.")
        )
    return NextStep(say(" ").join(parts), command)


def _finer_type(records: Mapping[str, Record], subject: str) -> str:
    """Command that makes the next type which is finer than all that failed, "" if none is."""
    files, source = _quantized(records), records["quantize"].inputs.get("gguf")
    failed = {f.type or "" for name, f in files.items() if not _passes(records["qc"], name)}
    if source is None or not failed <= set(_COARSE_TO_FINE):
        return ""
    finest = max(_COARSE_TO_FINE.index(kind) for kind in failed)
    made = {file.type for file in files.values()}
    untried = [kind for kind in _COARSE_TO_FINE[finest + 1 :] if kind not in made]
    if not untried:
        return ""
    out = Path(files[subject].path or subject).parent
    return commands.command("quantize", source.path, "--type", untried[0], "--out", out)


def _named(checks: Iterable[Check], subject: str) -> str:
    """``kl.mean 0.1217 (≤ 0.08) of FILE``."""
    listed = list(checks)
    parts = [f"{c.id} {fmt.number(c.value)} ({fmt.limit(c)})" for c in listed[:_CHECKS_NAMED]]
    if len(listed) > _CHECKS_NAMED:
        parts.append(say("{count} more", count=len(listed) - _CHECKS_NAMED))
    named = say(", ").join(parts)
    return say("{checks} of {name}", checks=named, name=subject) if subject else named


def _passes(qc: Record, subject: str) -> bool:
    mine = [check for check in qc.checks if check.subject == subject]
    return any(c.verdict is Verdict.PASS for c in mine) and not any(c.failed for c in mine)


def _quantized(records: Mapping[str, Record]) -> dict[str, QuantizedFile]:
    """File name → what it is, for the files that both quantize and qc know."""
    if "quantize" not in records or "qc" not in records:
        return {}
    judged = {check.subject for check in records["qc"].checks}
    files = QuantizeMetrics.of(records["quantize"]).files
    return {name: file for name, file in files.items() if name in judged}


def _sizes(records: Mapping[str, Record]) -> dict[str, int]:
    """Name → bytes of the GGUF files of this run, exported and quantized."""
    return {
        Path(output.path).name: output.bytes
        for stage in ("quantize", "export")
        if stage in records
        for output in records[stage].outputs.values()
    }
