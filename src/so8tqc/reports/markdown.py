"""Records as Markdown, for pull requests and people without a browser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from so8tqc.records import Record
from so8tqc.reports import format as fmt

TEMPLATES = Path(__file__).parent / "templates"


def stage_markdown(record: Record) -> str:
    """One stage: verdict, diagnosis, checks."""
    text: str = _environment().get_template("stage.md.j2").render(record=record)
    return text


def run_markdown(records: Mapping[str, Record], summary: Mapping[str, Any]) -> str:
    """A whole run: headline, stages, then each stage's checks."""
    text: str = _environment().get_template("run.md.j2").render(records=records, summary=summary)
    return text


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
        "ranges": ranges,
    }
    return environment


def _cell(text: object) -> str:
    """Text that cannot break out of a table cell."""
    return str(text).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def ranges(layers: Sequence[int]) -> str:
    """(0, 1, 2, 5) → ``0–2, 5``."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(f"{p[0]}–{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
