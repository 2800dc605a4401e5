"""Which checks count for the verdict: what a profile, --fail-on and --allow make of them."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from so8tqc.records import Check, Verdict, judge
from so8tqc.services.qc.profiles import Profile


def tuned(
    checks: Sequence[Check], profile: Profile, fail_on: Sequence[str], allow: Sequence[str]
) -> tuple[list[Check], list[str]]:
    """Mark which checks do not count for the verdict, and judge the tuning itself.

    Args:
        checks: all checks of a run.
        profile: may forbid skipped checks (``profile.skips``).
        fail_on: glob patterns of check ids; if any are given, only these count.
        allow: glob patterns of check ids that do not count.

    Returns:
        The checks, those that did not pass but do not count with ``allowed``, and
        ``profile.…`` checks; and notices about patterns that match nothing.
    """

    def counts(check: Check) -> bool:
        if check.verdict is Verdict.PASS:
            return True
        chosen = not fail_on or any(fnmatch.fnmatchcase(check.id, pattern) for pattern in fail_on)
        return chosen and not any(fnmatch.fnmatchcase(check.id, pattern) for pattern in allow)

    result = [c if counts(c) else c.model_copy(update={"allowed": True}) for c in checks]
    ids = {check.id for check in checks}
    idle = [pattern for pattern in fail_on if not fnmatch.filter(ids, pattern)]
    if idle:
        detail = f"--fail-on patterns that match no check of this run: {', '.join(idle)}."
        result.append(judge("profile.fail_on", len(idle), 0, detail=detail))
    if profile.skips == "forbid":
        names = [c.id for c in result if c.verdict is Verdict.SKIP and not c.allowed]
        detail = f"Checks skipped, which the profile forbids: {', '.join(names) or 'none'}."
        result.append(judge("profile.skips", len(names), 0, detail=detail))
    notices = [
        f"--allow {pattern} matches no check of this run."
        for pattern in allow
        if not fnmatch.filter(ids, pattern)
    ]
    return result, notices
