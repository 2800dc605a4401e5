"""docs/fault-matrix.md from the fault table: ``python tests/faults/document.py``."""

from __future__ import annotations

from pathlib import Path

from fault_table import FAULTS, Fault

DOCUMENT = Path(__file__).parents[2] / "docs" / "fault-matrix.md"

_HEAD = """\
# The fault matrix

Correct bakes, broken in every way that is known to happen, and what `so8tqc qc` says about them.
Each fault is made on two tiny architectures (Llama, and Qwen3 with heads × head_dim ≠ hidden_size)
in the storage dtypes named, and judged by the real service, from the files alone; one combination
of each is also run. The verdict is `fail` every time, the checks listed fail whatever architecture
and dtype, and the diagnosis is the only code reported.
Twenty correct bakes with other seeds, conventions, parametrizations and sites pass without one.

`tests/faults/` makes them; this page is written by `python tests/faults/document.py`.

| fault | storage | caught from files by | caught from logits by | diagnosis |
|---|---|---|---|---|
"""

_FOOT = """
Rounding faults, and 1 % of one q_proj, need not show in logits: where the storage dtype is bfloat16
they are as small as its own rounding. A file of another tokenizer is never run with it: candidates
are compared on the reference's tokens. A model that lacks tensors or holds NaN is not run; its
files say it all.

**The wrong importance matrix.** One of another shape is refused when quantizing. One of the right
shape gives a valid file of the right weights, only worse: nothing in the file tells whose matrix
weighed it (the record of `quantize` does, by SHA-256). What `qc` sees is the loss. The matrix of
this table puts all its weight on every 32nd column, and tensors then lose more than a whole bit
beside plain rounding. A mildly wrong matrix stays within the limits, and passes.
"""


def fault_matrix() -> str:
    """The document."""
    return _HEAD + "".join(_row(fault) for fault in FAULTS) + _FOOT


def _row(fault: Fault) -> str:
    cells = (
        fault.text,
        ", ".join(fault.dtypes),
        _ids(fault.caught_by),
        _ids(fault.logits),
        f"`{fault.diagnosis}`",
    )
    return "| " + " | ".join(cells) + " |\n"


def _ids(checks: tuple[str, ...]) -> str:
    return ", ".join(f"`{check}`" for check in checks) or "–"


if __name__ == "__main__":
    DOCUMENT.write_text(fault_matrix(), encoding="utf-8")
