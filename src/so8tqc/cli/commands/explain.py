"""so8tqc explain"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from so8tqc.languages import Language

if TYPE_CHECKING:
    from so8tqc.services.explain import Explanation


def explain(
    ids: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ID]...",
            help="Check, diagnosis code, profile, GGUF file type or exit code; without one, all "
            "are listed.",
            show_default=False,
        ),
    ] = None,
    lang: Annotated[Language, typer.Option(help="Language.")] = Language.ENGLISH,
    json: Annotated[
        bool, typer.Option("--json", help="Print the explanations as JSON on stdout.")
    ] = False,
) -> None:
    """Say what a check, a diagnosis, a profile or an exit code means, and what to do then.

    A check may be named with what was judged: then only the limits of that file's type are shown.

    Examples:

        so8tqc explain kl.mean

        so8tqc explain kl.mean@Q5_K_M transposed

        so8tqc explain 3 --lang ja

        so8tqc explain
    """
    from so8tqc.cli.explanations import print_explanations, print_list
    from so8tqc.reports.language import spoken
    from so8tqc.services.explain import everything
    from so8tqc.services.explain import explain as service

    found = [known for name in ids for known in service(name)] if ids else list(everything())
    with spoken(lang):
        if json:
            _print_json(found)
        elif ids:
            print_explanations(found)
        else:
            print_list(found)


def _print_json(found: Sequence[Explanation]) -> None:
    """The words in the language in use; ids, kinds and limits as they are."""
    import json

    from so8tqc.reports.language import say

    told = []
    for explanation in found:
        fields = explanation.model_dump(mode="json")
        words = {name: say(fields[name]) for name in ("title", "meaning", "failure", "remedy")}
        told.append(fields | words)
    typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
