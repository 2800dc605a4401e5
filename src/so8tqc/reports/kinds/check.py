"""The answer of ``check`` in a few lines."""

from __future__ import annotations

from so8tqc.record_kinds.check import CheckMetrics
from so8tqc.records import Record
from so8tqc.reports.language import say
from so8tqc.reports.measured import measured


def answer(record: Record) -> list[tuple[str, str]]:
    """Label and sentence of each line: what, trust, what was not looked at, what next, to serve."""
    found = CheckMetrics.of(record)
    lines = [("", measured(found.what)), ("", measured(found.trust))]
    if found.unseen:
        lines.append(
            (
                say("Not looked at"),
                say("; ").join(measured(text.rstrip(".")) for text in found.unseen),
            )
        )
    if found.next:
        lines.append((say("Next"), found.next))
    if found.serve:
        lines.append((say("To serve it"), found.serve))
    return lines
