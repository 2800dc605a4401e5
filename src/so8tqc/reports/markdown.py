"""Records as Markdown, for pull requests and people without a browser."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from so8tqc.records import Record
from so8tqc.reports import format as fmt
from so8tqc.reports.tables import Table

TEMPLATES = Path(__file__).parent / "templates"


def stage_markdown(record: Record, tables: Sequence[Table], summary: Mapping[str, Any]) -> str:
    """One stage: verdict, what to do next, tables, checks."""
    return _render("stage.md.j2", record=record, tables=tables, summary=summary)


def run_markdown(
    records: Mapping[str, Record],
    tables: Mapping[str, Sequence[Table]],
    summary: Mapping[str, Any],
) -> str:
    """A whole run: the first screen, then each stage's tables and checks, folded."""
    return _render("run.md.j2", records=records, tables=tables, summary=summary)


def _render(template: str, **values: object) -> str:
    text: str = _environment().get_template(template).render(**values)
    # templates leave runs of blank lines where a record has nothing to show
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Markdown is no HTML: cells are escaped by the filter below instead
    environment = Environment(  # noqa: S701
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": fmt.number,
        "interval": fmt.interval,
        "limit": fmt.limit,
        "target": fmt.target,
        "size": fmt.size,
        "percent": fmt.percent,
        "cell": _cell,
        "ranges": fmt.ranges,
    }
    return environment


def _cell(text: object) -> str:
    """Text that cannot break out of a table cell."""
    return str(text).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
