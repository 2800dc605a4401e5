"""Two runs side by side: the tables of a comparison, its HTML page and its Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import JsonValue

from so8tqc.record_kinds.comparison import (
    Change,
    ComparisonMetrics,
    FileChange,
    FileSide,
    Value,
    ValueSide,
    VerdictChange,
)
from so8tqc.record_kinds.pairs import Comparisons, Measure
from so8tqc.records import Record
from so8tqc.reports import format as fmt
from so8tqc.reports.language import current, message, say
from so8tqc.reports.tables import Table
from so8tqc.reports.templating import render, render_markdown

_ORDER = (
    message("worse"),
    message("better"),
    message("undecided"),
    message("not comparable"),
)
_SHOWN_DIGITS = 12
_VALUES = message("Values")


class Part(NamedTuple):
    """A table with a sentence on how to read it."""

    table: Table
    note: str


def sentence(record: Record) -> str:
    """What changed, in one sentence."""
    m = ComparisonMetrics.of(record)
    if not m.changed:
        return say(
            "Nothing changed: config and versions are the same, files ({files}) and measured "
            "values ({values}), too.",
            files=m.same["files"],
            values=m.same["values"],
        )
    reason = m.paired["reason"]
    outcomes = [value["outcome"] for value in m.values]
    told = [f"{say(word)} {outcomes.count(word)}" for word in _ORDER if word in outcomes]
    changed = say(
        "Changed: options {options}, versions {versions}, files {files}, verdicts {verdicts}, "
        "measured values {values}{told}.",
        options=len(m.config),
        versions=len(m.versions),
        files=len(m.files),
        verdicts=len(m.verdicts),
        values=len(outcomes),
        told=f" ({', '.join(told)})" if told else "",
    )
    return changed + (
        " " + say("Not compared token by token: {reason}.", reason=reason) if reason else ""
    )


def comparison_parts(record: Record) -> list[Part]:
    """The tables that hold something, the most important first."""
    m = ComparisonMetrics.of(record)
    verdicts = Table(
        say("Verdicts"), [say("check"), "A", "B"], [_verdict(row) for row in m.verdicts]
    )
    pairs = Table(
        say("Token by token"),
        [say("candidate"), say("measure"), "B − A", "95 %", "p", say("nearer")],
        _pairs(m.paired["comparisons"]),
    )
    values = Table(
        say(_VALUES),
        [say("check"), "A", "B", say("B is"), say("by")],
        [_value(row) for row in sorted(m.values, key=_rank)],
    )
    files = Table(
        say("Files"), [say("file"), say("role"), "A", "B"], [_file(row) for row in m.files]
    )
    parts = [
        Part(verdicts, say("Checks that ended otherwise, or that only one run has (–).")),
        Part(pairs, _paired_note(m)),
        Part(values, say("Measured values that differ, with their 95 % intervals.")),
        Part(
            _changes(say("Config"), say("option"), m.config),
            say("OUT stands for each run's own directory."),
        ),
        Part(
            files,
            say("By SHA-256; {count} others are the same in both runs.", count=m.same["files"]),
        ),
        Part(_changes(say("Versions"), say("package"), m.versions), ""),
    ]
    return [part for part in parts if part.table.rows]


def comparison_tables(record: Record) -> list[Table]:
    """The comparison's tables for a terminal; how a value was judged is left to the report."""
    tables = [part.table for part in comparison_parts(record)]
    return [
        table._replace(header=table.header[:-1], rows=[row[:-1] for row in table.rows])
        if table.title == say(_VALUES)
        else table
        for table in tables
    ]


def comparison_html(record: Record) -> str:
    """``comparison.html``: one file that needs no other."""
    return render("comparison.html.j2", **_told(record))


def comparison_markdown(record: Record) -> str:
    """``comparison.md``."""
    return render_markdown("comparison.md.j2", **_told(record))


def _told(record: Record) -> dict[str, object]:
    """What both templates are filled with."""
    return {
        "record": record,
        "language": str(current()),
        "m": ComparisonMetrics.of(record),
        "sentence": sentence(record),
        "parts": comparison_parts(record),
        "names": _names(record),
    }


def _names(record: Record) -> tuple[str, str]:
    """The directories, as short as tells them apart."""
    m = ComparisonMetrics.of(record)
    a, b = Path(m.a["directory"]), Path(m.b["directory"])
    return (a.name, b.name) if a.name != b.name and a.name and b.name else (str(a), str(b))


def _paired_note(m: ComparisonMetrics) -> str:
    comparisons = m.paired["comparisons"]
    if not comparisons:
        return ""
    note = f" {m.paired['note']}" if m.paired["note"] else ""
    texts = say("{count} texts.", count=comparisons["texts"])
    return f"{texts} {comparisons['method']}{note}"


def _changes(title: str, what: str, changes: Sequence[Change]) -> Table:
    rows = [[row["name"], _plain(row["a"]), _plain(row["b"])] for row in changes]
    return Table(title, [what, "A", "B"], rows)


def _verdict(row: VerdictChange) -> list[str]:
    return [_check(row), *(say(side) if side else "–" for side in (row["a"], row["b"]))]


def _check(row: VerdictChange | Value) -> str:
    if not row["subject"]:
        return row["id"]
    return say("{check} of {subject}", check=row["id"], subject=row["subject"])


def _pairs(comparisons: Comparisons | None) -> list[list[str]]:
    rows = []
    for pair in comparisons["pairs"] if comparisons else ():
        for found, title in (
            (pair["kl"], say("KL, nats")),
            (pair["nll"], say("NLL, nats")),
            (pair["top1"], say("same top")),
        ):
            interval = found["ci95"]
            better = found["better"]
            rows.append(
                [
                    pair["a"].partition("'s ")[2],
                    title,
                    _signed(found["difference"]),
                    "" if interval is None else " … ".join(map(_signed, interval)),
                    "" if found["p"] is None else f"{found['p']:.3g}",
                    better[0] if better else _nobody(found),
                ]
            )
    return rows


def _nobody(found: Measure) -> str:
    if found["ci95"] is None:
        return say("too few texts")
    same = found["difference"] == 0 and found["ci95"] == (0, 0)
    return say("equal") if same else say("undecided")


def _value(row: Value) -> list[str]:
    sides = [_measured(row["a"]), _measured(row["b"])]
    return [_check(row), *sides, say(row["outcome"]), row["how"]]


def _measured(side: ValueSide) -> str:
    text = fmt.number(side["value"])
    interval = side["ci95"]
    if interval is None:
        return text
    return f"{text} ({interval[0]:.3g} … {interval[1]:.3g})"


def _rank(row: Value) -> int:
    return _ORDER.index(row["outcome"])


def _file(row: FileChange) -> list[str]:
    of = f"{row['role']}: {', '.join(row['stages'])}"
    return [row["name"], of, _ref(row["a"]), _ref(row["b"])]


def _ref(ref: FileSide | None) -> str:
    if ref is None:
        return "–"
    return f"{ref['path']}, {fmt.size(ref['bytes'])}, {ref['sha256'][:_SHOWN_DIGITS]}"


def _plain(value: JsonValue) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _signed(value: float) -> str:
    return f"{value:+.3g}"
