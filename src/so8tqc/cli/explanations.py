"""Explanations on a terminal: sentences, and the limits of the profiles as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from so8tqc.cli.show import trimmed
from so8tqc.reports import format as fmt
from so8tqc.reports.language import message, say
from so8tqc.services.explain import MODELS, OTHER_TYPES, Explanation, Kind, ProfileLimit

_HEADINGS = {
    Kind.CHECK: message("Checks"),
    Kind.DIAGNOSIS: message("Diagnoses"),
    Kind.PROFILE: message("Profiles"),
    Kind.FILE_TYPE: message("GGUF file types"),
    Kind.EXIT_CODE: message("Exit codes"),
}
_FILES = {MODELS: message("model directories"), OTHER_TYPES: message("other GGUF types")}
_COLUMNS = (message("check"), message("profile"), message("files"), message("limit"))
_COLUMN_OF = {Kind.CHECK: "check", Kind.PROFILE: "profile", Kind.FILE_TYPE: "files"}
"""The column that says of every row what is explained; it is left out."""

_TROUBLE = frozenset({Kind.CHECK, Kind.DIAGNOSIS, Kind.EXIT_CODE})
"""Kinds whose remedy is a remedy; a profile's is how it is chosen."""


def print_explanations(found: Sequence[Explanation]) -> None:
    """Print each with its sentences and limits, a blank line between two."""
    with trimmed() as console:
        for i, explanation in enumerate(found):
            if i:
                console.print()
            _print(console, explanation)


def print_list(found: Sequence[Explanation]) -> None:
    """Print ids and titles, kind by kind."""
    with trimmed() as console:
        width = max(len(explanation.id) for explanation in found)
        for i, (kind, heading) in enumerate(_HEADINGS.items()):
            table = Table(box=None, pad_edge=False, show_header=False)
            table.add_column(min_width=width, no_wrap=True)
            table.add_column(overflow="fold")
            for explanation in found:
                if explanation.kind is kind:
                    table.add_row(explanation.id, escape(say(explanation.title)))
            console.print(("\n" if i else "") + f"[bold]{escape(say(heading))}[/]")
            console.print(table)


def _print(console: Console, explanation: Explanation) -> None:
    title, meaning, failure, remedy = (
        escape(say(text))
        for text in (
            explanation.title,
            explanation.meaning,
            explanation.failure,
            explanation.remedy,
        )
    )
    console.print(f"[bold]{explanation.id}[/]  {title}", highlight=False)
    for text in (
        meaning,
        say("If it fails: {what}.", what=failure) if failure else "",
        say("Then: {what}", what=remedy) if remedy and explanation.kind in _TROUBLE else remedy,
    ):
        if text:
            console.print(text, highlight=False)
    if explanation.limits:
        console.print()
        console.print(_limit_table(explanation))


def _limit_table(explanation: Explanation) -> Table:
    """A row for each limit; profiles and types that share one share its row."""
    used = [column for column in _COLUMNS if column != _COLUMN_OF.get(explanation.kind)]
    table = Table(box=None, pad_edge=False)
    for column in used:
        table.add_column(say(column), overflow="fold")
    for row in _rows(explanation.limits):
        cells = dict(zip(_COLUMNS, row, strict=True))
        table.add_row(*(escape(cells[column]) for column in used))
    return table


def _rows(limits: Iterable[ProfileLimit]) -> list[tuple[str, str, str, str]]:
    by_profile: dict[tuple[str, str, str], list[str]] = {}  # check, profile, limit → files
    for limit in limits:
        files = say(_FILES[limit.files]) if limit.files in _FILES else limit.files
        by_profile.setdefault((limit.check, limit.profile, _written(limit)), []).append(files)
    shared: dict[tuple[str, str, str], list[str]] = {}  # check, files, limit → profiles
    comma = say(", ")
    for (check, profile, written), files_of in by_profile.items():
        shared.setdefault((check, comma.join(files_of), written), []).append(profile)
    return [(c, comma.join(profiles), files, w) for (c, files, w), profiles in shared.items()]


def _written(limit: ProfileLimit) -> str:
    """``≤ 0.25``; of a target, how the noise floor widens it."""
    sign = {"<=": "≤", ">=": "≥"}[limit.comparison]
    if not limit.floor_factor or limit.target is None:
        value = limit.limit if limit.target is None else limit.target
        return f"{sign} {fmt.number(value)}"
    target, factor = fmt.number(limit.target), fmt.number(limit.floor_factor)
    values = {"target": target, "factor": factor}
    match limit.files == MODELS, limit.comparison:
        case True, "<=":
            return say("≤ max({target}, {factor} × noise floor)", **values)
        case True, _:
            return say("≥ min({target}, 1 − {factor} × (1 − noise floor) − 1 / tokens)", **values)
        case False, "<=":
            return say("≤ max({target}, {factor} × quantization floor)", **values)
        case _:
            return say(
                "≥ min({target}, 1 − {factor} × (1 − quantization floor) − 1 / tokens)", **values
            )
