"""so8tqc vendor"""

from __future__ import annotations

from so8tqc.cli.options import JsonOption, QuietOption
from so8tqc.cli.stage import Output, finish


def vendor(json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Fetch llama.cpp's converter from the pinned source package, checked by SHA-256.

    Examples:

        so8tqc vendor
    """
    from so8tqc.cli.progress import terminal_progress
    from so8tqc.services.vendor import vendor as service

    with terminal_progress(quiet=quiet) as progress:
        record = service(progress)
    finish(record, Output(json, quiet))
