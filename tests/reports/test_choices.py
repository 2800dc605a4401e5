"""Tables of compared files and candidates, from what a record may hold."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import pytest

from so8tqc.records import Record, RunInfo, Verdict, jsonable
from so8tqc.reports.kinds.choose import terminal_tables
from so8tqc.reports.pairs import pair_table


def record(difference: float, interval: tuple[float, float] | None) -> Record:
    measure = {"difference": difference, "ci95": interval, "p": 0.5, "better": None}
    pair = {"a": "A", "b": "B", "kl": measure, "nll": measure, "top1": measure, "winner": None}
    return Record(
        kind="qc",
        verdict=Verdict.PASS,
        metrics={"comparisons": jsonable({"pairs": [pair]})},
        run=RunInfo(started=datetime(2026, 1, 1, tzinfo=UTC), seconds=0.0),
    )


@pytest.mark.parametrize("difference", [0.25, -math.inf, math.nan])
@pytest.mark.parametrize("interval", [None, (-1.0, 2.0), (-math.inf, math.inf)])
def test_differences_are_written_whatever_was_measured(
    difference: float, interval: tuple[float, float] | None
) -> None:
    """JSON has no infinity: the record holds it as text."""
    made = record(difference, interval)
    table = pair_table(made)
    assert table is not None
    (row,) = table.rows
    said = f"{difference:+.3g}"
    assert row[1] == (
        said if interval is None else f"{said} ({interval[0]:+.3g} … {interval[1]:+.3g})"
    )
    (narrow,) = [t for t in terminal_tables(made) if t.header[0] == "pair"]
    assert narrow.rows[0][1] == said
