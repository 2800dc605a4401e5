"""A verified statement as a table: what became of every link."""

from __future__ import annotations

from so8tqc.record_kinds.attest import VerifyMetrics
from so8tqc.records import Record
from so8tqc.reports.tables import Table


def link_tables(record: Record) -> list[Table]:
    """The links of a statement; none for a single file that was made again."""
    links = VerifyMetrics.of(record).links or {}
    rows = [[name, link["found"], link["text"]] for name, link in links.items()]
    return [Table("Links", ["link", "made again", "what was seen"], rows)] if rows else []
