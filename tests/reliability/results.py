"""Counts what was tried and writes ``crash.json``: ``pytest tests/reliability --crash-results``.

A row is one kind of disturbance of one command: ``{"kind", "tried", "count", "outcome",
"planted"}``: what was done to it, how often, what came out, and the fault of ours that turns the
test red (each was planted by hand, once). A row is written only when its test has passed.
"""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).with_name("crash.json")

_OUTCOMES = {
    "killed": "No output was half there; the same command then ended with the same bytes.",
    "refused": "One error that names path and cause, exit code 4, nothing half there, temporaries "
    "gone where anything could be deleted; the same command then ended with the same bytes.",
    "interrupted": "Exit code 130 (SIGINT) or 143 (SIGTERM), said how to go on, no output half "
    "there, no temporary left; the same command then ended with the same bytes.",
    "random": "No output was half there; the run went on, and ended with the same bytes.",
}
_PLANTED = {
    "killed": "A file written in place instead of renamed; an fsync before or after "
    "a rename left out; a record written before what it names. attest, and a run in its stages' "
    "folders, left temporaries for ever; a stage was taken for done before its reports were "
    "written (all mended).",
    "refused": "Temporaries that an error leaves behind; an fsync whose failure is ignored.",
    "interrupted": "SIGTERM left its temporaries; Ctrl-C did while one was made, or deleted (all "
    "three mended).",
    "random": "A stage entered in the manifest before it is done.",
}


class Results:
    """Rows by kind and command; a test adds to them when it has passed.

    Args:
        path: written after each addition, so that a run that is ended keeps its rows; or None.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._counts: dict[tuple[str, str, str], int] = {}

    def add(self, kind: str, command: str, how: str, count: int) -> None:
        """Remember that a command passed so many disturbances.

        Args:
            kind: ``killed``, ``interrupted``, ``refused`` or ``random``.
            command: the case's name.
            how: signal or errno.
            count: how many operations were disturbed, or moments tried.
        """
        key = (kind, command, how)
        self._counts[key] = self._counts.get(key, 0) + count
        if self._path is not None:
            self._write(self._path)

    def _write(self, path: Path) -> None:
        """Write the rows, in order; counts of tests that were not run now stay."""
        old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        counts = {(row["kind"], row["tried"]): row["count"] for row in old}
        counts |= {(kind, f"{case}: {how}"): n for (kind, case, how), n in self._counts.items()}
        rows = [
            {
                "kind": kind,
                "tried": tried,
                "count": count,
                "outcome": _OUTCOMES[kind],
                "planted": _PLANTED[kind],
            }
            for (kind, tried), count in sorted(counts.items())
        ]
        text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")
