"""Tables of records, as strings: the same ones in HTML and Markdown.

Each function takes what the record holds and leaves out what it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeVar

from pydantic import JsonValue

from so8tqc.record_kinds.base import plain_metrics
from so8tqc.records import Record
from so8tqc.reports import format as fmt
from so8tqc.reports.language import say
from so8tqc.wording import percent

Row = TypeVar("Row")


class Table(NamedTuple):
    """A title, column names, and rows of text; the first column names the row."""

    title: str
    header: list[str]
    rows: list[list[str]]


Column = tuple[str, Callable[[Row], str]]
Reader = Callable[[Row], float | None]


def generic_tables(record: Record) -> list[Table]:
    """Metrics of a stage that has no tables of its own: numbers first, then mappings of them."""
    tables = []
    metrics = plain_metrics(record)
    simple = {k: v for k, v in metrics.items() if isinstance(v, (int, float, str, bool))}
    if simple:
        rows = [[name, plain(value)] for name, value in simple.items()]
        tables.append(Table(say("Measured"), ["", say("value")], rows))
    for key, found in metrics.items():
        group = _entries(found)
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


def _entries(found: JsonValue) -> dict[str, dict[str, JsonValue]]:
    """The mappings in a mapping; what has another shape is left out."""
    if not isinstance(found, dict):
        return {}
    return {name: entry for name, entry in found.items() if isinstance(entry, dict)}


def tabulate(
    title: str, first: str, columns: Iterable[Column[Row]], rows: Mapping[str, Row]
) -> Table | None:
    """A table of these columns and rows; None without rows. An empty column is left out."""
    if not rows:
        return None
    cells = {name: [render(row) for row in rows.values()] for name, render in columns}
    used = {name: texts for name, texts in cells.items() if set(texts) - {"", "–"}}
    body = [[label, *(texts[i] for texts in used.values())] for i, label in enumerate(rows)]
    return Table(title, [first, *used], body)


def plain(value: object) -> str:
    return fmt.number(value) if isinstance(value, float) else str(value)


def number_of(read: Reader[Row]) -> Callable[[Row], str]:
    return lambda row: fmt.number(read(row))


def scientific_of(read: Reader[Row]) -> Callable[[Row], str]:
    return lambda row: "" if (value := read(row)) is None else f"{value:.1e}"


def percent_of(read: Reader[Row]) -> Callable[[Row], str]:
    return lambda row: "" if (value := read(row)) is None else percent(value)


def signed_percent_of(read: Reader[Row]) -> Callable[[Row], str]:
    return lambda row: "" if (value := read(row)) is None else f"{100 * value:+.2f} %"


def size_of(read: Reader[Row]) -> Callable[[Row], str]:
    return lambda row: "" if (value := read(row)) is None else fmt.size(value)


def counted_types(counts: Mapping[str, int] | None) -> str:
    """``166 Q5_1, 61 F32``, the most frequent first."""
    ordered = sorted((counts or {}).items(), key=lambda item: -item[1])
    return ", ".join(f"{count} {name}" for name, count in ordered)
