"""Diagnoses in the language of a report: the finding is said, what was measured stays."""

from __future__ import annotations

from so8tqc.records import Diagnosis
from so8tqc.reports.language import message, say

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
    message("non_finite"),
    message("non_orthogonal"),
    message("storage_rounding"),
)


def finding(diagnosis: Diagnosis) -> str:
    """Its text: a record writes ``what is wrong: what was measured``; the first is a message."""
    head, colon, measured = diagnosis.text.partition(": ")
    return f"{say(head)}{colon}{measured}" if colon else say(head)
