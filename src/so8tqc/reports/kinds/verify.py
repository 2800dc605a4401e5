"""A verified statement as a table: what became of every link."""

from __future__ import annotations

from so8tqc.records import Record
from so8tqc.reports.tables import Table, entries


def link_tables(record: Record) -> list[Table]:
    """The links of a statement; none for a single file that was made again."""
    links = entries(record, "links")
    rows = [[name, str(link.get("found")), str(link.get("text"))] for name, link in links.items()]
    return [Table("Links", ["link", "made again", "what was seen"], rows)] if rows else []
