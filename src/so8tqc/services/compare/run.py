"""A run directory as its records tell of it, with names that do not depend on where it lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from so8tqc.errors import InputError
from so8tqc.metrics.divergence import TokenTable
from so8tqc.record_files import read_record
from so8tqc.record_kinds.run import RunMetrics
from so8tqc.records import Record
from so8tqc.services.qc.token_file import TOKENS_FILE, read_tokens
from so8tqc.services.report import read_stages


@dataclass(frozen=True)
class Run:
    """What a run directory says of itself.

    Attributes:
        directory: where it lies.
        name: of the model its files are named after, "" if no run record says it.
        root: the directory as the records write it.
        whole: the run's own record, if there is one.
        stages: stage → record.
        tables: candidate → token table.
    """

    directory: Path
    name: str
    root: str
    whole: Record | None
    stages: Mapping[str, Record]
    tables: Mapping[str, TokenTable]

    def plain(self, text: str) -> str:
        """A name or path without what only says which run it is of."""
        if text == self.root or text.startswith(f"{self.root}/"):
            text = f"OUT{text.removeprefix(self.root)}"
        return text.removeprefix(f"{self.name}-") if self.name else text


def read_run(directory: Path) -> Run:
    """The records and token tables of a run directory, or of a stage's.

    Raises:
        InputError: there is no record, or one that cannot be read.
    """
    own = read_record(directory / "record.json") if (directory / "record.json").is_file() else None
    if own is not None and own.kind != "run":
        stages = {own.kind: own}
        whole, tokens, root = None, directory / TOKENS_FILE, str(own.config.get("out", directory))
    else:
        stages = read_stages(directory)
        whole, tokens = own, directory / "qc" / TOKENS_FILE
        root = str(own.config["out"]) if own else str(directory)
    return Run(
        directory=directory,
        name=(RunMetrics.of(whole).name or "") if whole else "",
        root=root.rstrip("/"),
        whole=whole,
        stages=stages,
        tables=read_tokens(tokens) if "qc" in stages and tokens.is_file() else {},
    )


def require_two(a: Path, b: Path) -> None:
    """See that there are two directories.

    Raises:
        InputError: they are one, or one is no directory.
    """
    for path in (a, b):
        if not path.is_dir():
            raise InputError("no such run directory", where=str(path))
    if a.resolve() == b.resolve():
        raise InputError("a run is compared with itself", where=str(a))
