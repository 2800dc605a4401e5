"""Diagnoses in the language of a report: what was found, and what to do."""

from __future__ import annotations

from so8tqc.check_guide import BEFORE_COMMANDS
from so8tqc.records import Diagnosis
from so8tqc.reports.language import message, say
from so8tqc.reports.measured import measured

CODES = (
    message("not_baked"),
    message("layer_missing"),
    message("transposed"),
    message("double_baked"),
    message("wrong_parametrization"),
    message("layers_permuted"),
    message("blocks_permuted"),
    message("wrong_site"),
    message("foreign_edit"),
    message("coarser_source"),
    message("other_tensor"),
    message("damaged_tensor"),
    message("non_finite"),
    message("non_orthogonal"),
    message("storage_rounding"),
    message("conversion"),
    message("misread"),
    message("rope_sections"),
    message("gates_off_images"),
    message("wrong_on_images"),
    message("wrong_operation"),
    message("runtime_differs"),
)


def finding(diagnosis: Diagnosis) -> str:
    """Its text: a record writes ``what is wrong: what was measured``."""
    return measured(diagnosis.text)


def remedy(diagnosis: Diagnosis) -> str:
    """What to do: one message, or one that a command line follows."""
    head, command = divided(diagnosis.remedy)
    return f"{say(head)} {command}" if command else say(diagnosis.remedy)


def divided(text: str) -> tuple[str, str]:
    """A remedy's words, and the command line that was made for it; "" if there is none."""
    for head in BEFORE_COMMANDS:
        if text.startswith(f"{head} "):
            return head, text.removeprefix(f"{head} ")
    return text, ""
