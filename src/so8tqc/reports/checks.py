"""What each check is called and what it means, by its id: words beside the measured sentence."""

from __future__ import annotations

from so8tqc.check_guide import DIAGNOSES, GUIDE
from so8tqc.languages import Language
from so8tqc.records import Record, Verdict
from so8tqc.reports import commands
from so8tqc.reports.language import current, message, say

VERDICTS = (message("pass"), message("fail"), message("skip"))
UNITS = (message("nats"), message("bytes"), message("ulp"), message("log nats / 1000 tokens"))


def title(check_id: str) -> str:
    """A few words; the id itself for a check that is not known here."""
    known = GUIDE.get(check_id)
    return say(known.title) if known else check_id


def meaning(check_id: str) -> str:
    """One sentence; "" for a check that is not known here."""
    known = GUIDE.get(check_id)
    return say(known.meaning) if known else ""


def explained_by(record: Record) -> str:
    """The command that explains what failed and what was diagnosed, "" where nothing was."""
    failed = [c.id for c in record.checks if c.verdict is Verdict.FAIL and c.id in GUIDE]
    named = [d.code for d in record.diagnosis if d.code in DIAGNOSES]
    if not failed and not named:
        return ""
    spoken = () if current() is Language.ENGLISH else ("--lang", current())
    return commands.command("explain", *dict.fromkeys([*failed, *named]), *spoken)
