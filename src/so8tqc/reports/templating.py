"""The jinja environments of the reports: one set of filters, escaping by kind of output."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from so8tqc.reports import checks, diagnoses
from so8tqc.reports import format as fmt
from so8tqc.reports.language import say
from so8tqc.reports.measured import measured
from so8tqc.wording import percent

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: object) -> str:
    """Fill a template; values are escaped in HTML, and by the filter ``cell`` in Markdown."""
    text: str = _environment().get_template(template).render(**values)
    return text


def render_markdown(template: str, **values: object) -> str:
    """As :func:`render`, without the blank lines that stay where a record has nothing to show."""
    return re.sub(r"\n{3,}", "\n\n", render(template, **values)).strip() + "\n"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        undefined=StrictUndefined,
        # Markdown is no HTML, and neither are the style and script that the page takes in
        autoescape=select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": fmt.number,
        "interval": fmt.interval,
        "half": fmt.half,
        "limit": fmt.limit,
        "target": fmt.target,
        "size": fmt.size,
        "percent": percent,
        "ranges": fmt.ranges,
        "cell": _cell,
        "marked": _marked,
    }
    environment.globals |= {
        "say": say,
        "measured": measured,
        "check_title": checks.title,
        "check_meaning": checks.meaning,
        "explained_by": checks.explained_by,
        "finding": diagnoses.finding,
        "remedy": diagnoses.remedy,
    }
    return environment


def _marked(text: object) -> Markup:
    """Escaped for HTML, ⟦what stands in these⟧ highlighted."""
    from markupsafe import Markup, escape

    before, opened, rest = str(text).partition("⟦")
    inside, closed, after = rest.rpartition("⟧")
    if not opened or not closed:
        return escape(str(text))
    return Markup("{}<mark>{}</mark>{}").format(before, inside, after)


def _cell(text: object) -> str:
    """Text that cannot break out of a Markdown table's cell."""
    return str(text).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
