"""docs/reliability.md from the results beside it: ``python tests/reliability/reliability_page.py``.

Every ``*.json`` here is the result of one part: a list of rows ``{"kind", "tried", "count",
"outcome", "planted"}`` (see ``results.py``), written by the run that made them and by nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "reliability.md"

_PARTS = {
    "hostile": ("Hostile files", "`nox -s fuzz`, `tests/hostile/`"),
    "numbers": ("Numbers", "`tests/metrics/test_extreme_logits.py`, "
                "`tests/services/test_non_finite.py`"),
    "scale": ("Scale", "`tests/scale/`, [what it costs](scale.md)"),
    "network": ("No network", "`tests/test_no_network.py`"),
    "attestation": (
        "Attestation", "`tests/services/attest/test_attest.py`, [what it is](attestation.md)",
    ),
    "crash": ("Killed, and refused by the disk", "`nox -s crash`, `tests/reliability/`"),
}  # fmt: skip
"""File → title, and what makes it; other files come after these, by their names."""

_HEAD = """\
# Reliability

What was done to `so8tqc`, how often, and what happened. Each table is written from the results of
the run that its first line names. *Shown by* says how the check itself is known to work: a fault of
ours that it found and that was mended, or one that was planted to turn it red.

Hostile inputs are *read* (accepted, and nothing else happened) or *refused* (one message that names
the file, and the exit code of its kind). There is no third outcome: anything else fails the run.
Python's audit events, the folder's files and the kernel's count of memory tell what else happened:
no input made a reader write, start or connect to anything, or take more than 1 GiB or 10 seconds.

Written by `python tests/reliability/reliability_page.py`.
"""


def document() -> str:
    """The page."""
    names = [path.stem for path in sorted(HERE.glob("*.json"))]
    ordered = [name for name in _PARTS if name in names]
    return _HEAD + "".join(map(_part, ordered + [n for n in names if n not in _PARTS]))


def _part(name: str) -> str:
    title, made_by = _PARTS.get(name, (name.capitalize(), f"`{name}.json`"))
    rows = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    total = sum(row["count"] for row in rows)
    head = [f"\n## {title}\n", f"{made_by}; {total:,} tries.\n"]
    return "\n".join((*head, *(_matrices(rows) if name == "crash" else _list(rows)))) + "\n"


def _list(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each row."""
    yield "| what was tried | how often | what happened | shown by |"
    yield "|---|---|---|---|"
    for row in rows:
        cells = (row["tried"], f"{row['count']:,}", row["outcome"], row["planted"])
        yield f"| {' | '.join(map(_cell, cells))} |"


def _matrices(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A table for each kind, command × disturbance; its rows share outcome and planted faults."""
    yield "Each number is how many operations on the disk were disturbed: all that the command"
    yield "asks for, unless it says one in so many. Of all three signals together, it is moments in"
    yield "time, drawn at random."
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row for row in rows if row["kind"] == kind]
        cells: dict[str, dict[str, str]] = {}
        for row in of_kind:
            case, how = row["tried"].split(": ")
            command, _, share = case.partition(", ")
            count = f"{row['count']:,}"
            some = f" ({share.removesuffix(' operations')})" if share else ""
            cells.setdefault(command, {})[how] = count + some
        hows = sorted({how for found in cells.values() for how in found})
        yield f"\n*What happened.* {of_kind[0]['outcome']}\n\n*Shown by.* {of_kind[0]['planted']}\n"
        yield f"| command | {' | '.join(hows)} |"
        yield "|---" * (1 + len(hows)) + "|"
        for command, found in cells.items():
            yield f"| {command} | {' | '.join(found.get(how, '') for how in hows)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
