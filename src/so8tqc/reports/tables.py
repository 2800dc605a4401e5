"""Tables of records, as strings: the same ones in HTML and Markdown.

Each function takes what the record holds and leaves out what it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from so8tqc.records import Record
from so8tqc.reports import format as fmt
from so8tqc.reports.language import say
from so8tqc.wording import percent


class Table(NamedTuple):
    """A title, column names, and rows of text; the first column names the row."""

    title: str
    header: list[str]
    rows: list[list[str]]


Column = tuple[str, Callable[[Mapping[str, Any]], str]]


def entries(record: Record, key: str) -> dict[str, dict[str, Any]]:
    """A metric that maps names to mappings; entries of another shape are left out."""
    found = record.metrics.get(key)
    if not isinstance(found, dict):
        return {}
    return {name: entry for name, entry in found.items() if isinstance(entry, dict)}


def layers(record: Record) -> list[dict[str, Any]]:
    """Rows of ``metrics.layers``."""
    rows = record.metrics.get("layers")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def generic_tables(record: Record) -> list[Table]:
    """Metrics of a stage that has no tables of its own: numbers first, then mappings of them."""
    tables = []
    simple = {k: v for k, v in record.metrics.items() if isinstance(v, (int, float, str, bool))}
    if simple:
        rows = [[name, plain(value)] for name, value in simple.items()]
        tables.append(Table(say("Measured"), ["", say("value")], rows))
    for key in record.metrics:
        group = entries(record, key)
        names = dict.fromkeys(
            name
            for entry in group.values()
            for name, value in entry.items()
            if isinstance(value, (int, float, str, bool))
        )
        if names:
            rows = [
                [label, *(plain(entry.get(name, "")) for name in names)]
                for label, entry in group.items()
            ]
            tables.append(Table(key.replace("_", " "), ["", *names], rows))
    return tables


def tabulate(
    title: str, first: str, columns: Iterable[Column], rows: Mapping[str, Mapping[str, Any]]
) -> Table | None:
    """None without rows; a column that stays empty is left out."""
    if not rows:
        return None
    cells = {name: [render(row) for row in rows.values()] for name, render in columns}
    used = {name: texts for name, texts in cells.items() if set(texts) - {"", "–"}}
    body = [[label, *(texts[i] for texts in used.values())] for i, label in enumerate(rows)]
    return Table(title, [first, *used], body)


def plain(value: object) -> str:
    return fmt.number(value) if isinstance(value, float) else str(value)


def number_of(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: fmt.number(row.get(key))


def scientific_of(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: f"{row[key]:.1e}" if key in row else ""


def percent_of(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: percent(row[key]) if key in row else ""


def signed_percent_of(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: f"{100 * row[key]:+.2f} %" if key in row else ""


def pair_of(group: str, *path: str) -> Callable[[Mapping[str, Any]], str]:
    """``reference → candidate``, or the candidate alone."""

    def render(row: Mapping[str, Any]) -> str:
        values = []
        for side in ("reference", "candidate"):
            value: Any = row.get(group, {}).get(side)
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            values += [] if value is None else [fmt.number(value)]
        return " → ".join(values)

    return render


def types_of(row: Mapping[str, Any]) -> str:
    return counted_types(row.get("types"))


def counted_types(counts: object) -> str:
    """``166 Q5_1, 61 F32``, the most frequent first."""
    if not isinstance(counts, dict):
        return ""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{count} {name}" for name, count in ordered)
