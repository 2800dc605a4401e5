"""What each check is called and what it means, by its id: words beside the measured sentence."""

from __future__ import annotations

from so8tqc.check_guide import GUIDE
from so8tqc.reports.language import message, say

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
