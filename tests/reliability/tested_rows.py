"""Rows of the parts that plain tests make: ``python tests/reliability/tested_rows.py [PART…]``.

Runs the tests of each row and counts those that pass; a row is written only if all of them do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent
TESTS = HERE.parent


class Row(NamedTuple):
    """What is told of some tests, and which: a file, and words that ``-k`` selects by."""

    part: str
    tried: str
    file: str
    words: str
    outcome: str
    planted: str


ROWS = (
    Row(
        "numbers", "Statistics of tokens by their definitions, in 64-bit mantissas: logits to "
        "±1e4, all equal, one-hot, one millionth apart; V from 2 to 262,144",
        "metrics/test_extreme_logits.py", "extreme or quarter",
        "To 1e-9 of the value, and 4e-15 of the largest logit.",
        "KL missed what the candidate gives to tokens whose probability in the reference is zero "
        "in float64; JS had seven digits where KL is 2e-4.",
    ),
    Row(
        "numbers", "The same token alone, in blocks of 1 to 9 rows, in any order",
        "metrics/test_extreme_logits.py", "neighbours", "To 1e-12.",
        "A block shifted by its largest logit, not each row by its own.",
    ),
    Row(
        "numbers", "Block sizes, and two processes instead of one",
        "sources", "block_size or two_processes_give",
        "Means to 1e-12; records and token tables of two processes to the bit.",
        "Targets counted from the block's start instead of the text's.",
    ),
    Row(
        "numbers", "NaN and ±∞ in rotations, in any tensor of base and candidate",
        "services/test_non_finite.py", "", "Found, and named by tensor and index.",
        "A NaN in a tensor that a bake does not touch was not looked for.",
    ),
    Row(
        "numbers", "float16 overflow in a bake", "services/test_bake.py", "overflow",
        "One error that names tensor and element; nothing is published.",
        "The test's own weights of 60,000, which a plain product stores as ∞.",
    ),
    Row(
        "scale", "The plan of a bake of 70B (141 GB of holes, 30 shards), structure checks, "
        "1,000 shards, 10,000 texts", "scale/test_scale.py", "not seen",
        "Memory beyond the imports stays below the limits in the tests.",
        "A reader that loads a tensor (in the same file) is over them.",
    ),
    Row(
        "attestation", "One byte edited anywhere in what ships: weights, headers, configuration, "
        "tokenizer, temperature, the statement itself", "services/attest/test_attest.py",
        "random_edits",
        "Each found: the file, in a file of weights the tensor; a statement is refused.",
        "Digests of weights alone compared; seals not compared; a form other than the canonical "
        "one accepted: each left edits unfound.",
    ),
    Row(
        "attestation", "A statement with a link dropped, moved, twice, or of another input, or "
        "with outputs exchanged, its digests computed anew", "services/attest/test_attest.py",
        "broken_chain or exchanged", "Refused with the link and what it lacks; what no chain "
        "shows is different when made again.",
        "Inputs not compared with what earlier links make; seals not compared.",
    ),
    Row(
        "attestation", "Made again: from the files, from base and rotations alone, with other "
        "rotations, after a forgery of file and statement, by another build of libllama",
        "services/attest/test_attest.py",
        "made_again or make_every_file or other_rotations or forged or another_build",
        "Identical, within rounding, different or not checked, as it is.",
        "What is made again compared with nothing: other rotations passed.",
    ),
    Row(
        "network", "`bake`, `qc` from files and with models, `report`, with every look-up and "
        "connection blocked, and no `HF_HUB_OFFLINE`", "test_no_network.py", "ask",
        "Nothing was asked of a network.", "A look-up and a connection of the test's own are seen.",
    ),
)  # fmt: skip


class _Count:
    """A plugin of pytest: how many tests passed; one may say that it is of several tries."""

    def __init__(self) -> None:
        self.passed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed += int(dict(report.user_properties).get("tries", 1))  # type: ignore[call-overload]


def main(wanted: Sequence[str]) -> int:
    """Run the tests, and write ``PART.json`` of every part, or of those wanted; 1 if any fails."""
    parts: dict[str, list[dict[str, object]]] = {}
    for row in ROWS:
        if wanted and row.part not in wanted:
            continue
        count = _Count()
        selected = [str(TESTS / row.file), "-q", *(["-k", row.words] if row.words else [])]
        if pytest.main(selected, plugins=[count]) != pytest.ExitCode.OK:
            return 1
        parts.setdefault(row.part, []).append(
            {
                "kind": row.part,
                "tried": row.tried,
                "count": count.passed,
                "outcome": row.outcome,
                "planted": row.planted,
            }
        )
    for part, rows in parts.items():
        text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
        (HERE / f"{part}.json").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
