"""Checks of whatever was given: what it is, whether to trust it, and what comes next."""

from __future__ import annotations

from so8tqc.record_kinds.base import Metrics


class CheckMetrics(Metrics):
    """Of kind ``check``.

    Attributes:
        what: what it is.
        trust: whether it is to be trusted, and by what that was seen.
        proved: whether it was compared with what it should be, and passed.
        readable: False for what cannot be judged because of what it is.
        unseen: what was not looked at, and what to give for it.
        next: the command that comes next.
        serve: the command that writes a runtime's own file, of a GGUF that is to be trusted.
        found: role → path, of what was found beside it.
    """

    what: str
    trust: str
    proved: bool
    readable: bool
    unseen: list[str]
    next: str
    found: dict[str, str]
    serve: str | None = None
