"""What the calibration set is made of: ``data/calibration-sources.json``, checked on reading."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from so8tqc.disk.atomic import write_text
from so8tqc.disk.foreign import read_whole
from so8tqc.errors import DataError
from so8tqc.records import Frozen
from so8tqc.resources import data_file

MANIFEST = "calibration-sources.json"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Language = Literal["en", "ja"]
Reader = Literal[
    "catalog",
    "html",
    "json-html",
    "json-text",
    "jsonl",
    "lyx",
    "markdown",
    "records",
    "text",
]


class Domain(StrEnum):
    """The ten domains of the calibration set."""

    MATHEMATICS_PHYSICS = "mathematics_physics"
    COMPUTING_AI = "computing_ai"
    LANGUAGE = "language"
    CULTURE_HISTORY = "culture_history"
    ETHICS_PHILOSOPHY = "ethics_philosophy"
    BUSINESS_ECONOMICS = "business_economics"
    BIOLOGY_CHEMISTRY = "biology_chemistry"
    ENGINEERING = "engineering"
    MEDICINE = "medicine"
    LITERATURE = "literature"


class Rule(Frozen):
    """A document whose tags and title match belongs to ``domain``; the first match wins.

    Attributes:
        domain: where to.
        tag: regular expression that must match all of one of the document's tags ("": none must).
        pattern: regular expression searched for in the title and the *other* tags, ignoring case.
    """

    domain: Domain
    tag: str = ""
    pattern: str = ""

    @field_validator("tag", "pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value


class Part(Frozen):
    """Files of one package that are read alike.

    Attributes:
        reader: how they are read.
        files: shell patterns of member names; ``A!/B`` is the member B of the member A, a zip.
        language: of the text.
        domain: of every document, or None where ``rules`` decide.
        rules: tried in order; a document that none fits is left out.
        keys: what the reader looks up (``json-text``, ``json-html``, ``jsonl``).
        only: regular expression a passage must contain.
        limit: at most this many passages of this part are used.
    """

    reader: Reader
    files: tuple[str, ...] = Field(min_length=1)
    language: Language
    domain: Domain | None = None
    rules: tuple[Rule, ...] = ()
    keys: tuple[str, ...] = ()
    only: str = ""
    limit: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_way(self) -> Part:
        if (self.domain is None) == (not self.rules):
            raise ValueError("give either a domain or rules")
        return self


class Source(Frozen):
    """One package file, pinned.

    Attributes:
        client: whose registry it comes from; the client fetches it.
        package: its name there.
        version: its version there.
        file: name of the downloaded file.
        sha256: of that file.
        licence: SPDX expression of the text that is used.
        licence_file: member of the package that states it.
        licence_phrase: words of that member by which the statement is found again.
        note: what to know about the licence or the text.
        parts: what is read from it.
    """

    client: Literal["pip", "npm", "apt"]
    package: str = Field(pattern=r"^(@[a-z0-9._-]+/)?[A-Za-z0-9][A-Za-z0-9._+-]*$")
    version: str = Field(pattern=r"^[0-9][A-Za-z0-9.+:~-]*$")
    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+~%-]*$")
    sha256: Sha256
    licence: str = Field(min_length=3)
    licence_file: str
    licence_phrase: str = Field(min_length=3)
    note: str = ""
    parts: tuple[Part, ...] = Field(min_length=1)

    @property
    def name(self) -> str:
        """``client:package``, by which samples name their source."""
        return f"{self.client}:{self.package}"


class Result(Frozen):
    """What a build with every source must give."""

    sha256: Sha256
    samples: int
    counts: dict[str, dict[str, int]]


class CorpusManifest(Frozen):
    """The recipe of the calibration set: packages, domains, and what came out.

    Attributes:
        seed: of the order in which passages are drawn.
        quota: passages of packages in each cell of language and domain, at most.
        written: patterns of the files in ``data/`` that hold texts written for this project.
        categories: domain of each category that those files use beside the domains.
        sources: packages.
        result: what comes out.
    """

    seed: int
    quota: dict[Language, int]
    written: tuple[str, ...]
    categories: dict[str, Domain]
    sources: tuple[Source, ...]
    result: Result

    @model_validator(mode="after")
    def _distinct(self) -> CorpusManifest:
        names = [source.name for source in self.sources]
        files = [source.file for source in self.sources]
        if len(set(names)) < len(names) or len(set(files)) < len(files):
            raise ValueError("a package is listed twice")
        return self


def manifest_path() -> Path:
    """Where the manifest lies."""
    return data_file(MANIFEST)


def read_corpus_manifest(path: Path | None = None) -> CorpusManifest:
    """The manifest that comes with the package, or another one.

    Raises:
        DataError: it is missing, or not a manifest.
    """
    path = path or manifest_path()
    try:
        return CorpusManifest.model_validate_json(read_whole(path, DataError))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"not a manifest: {first['msg']}", where=f"{path}: {key}" if key else str(path)
        ) from None


def write_result(path: Path, manifest: CorpusManifest, result: Result) -> None:
    """Write the manifest with another result; everything else stays."""
    changed = manifest.model_copy(update={"result": result})
    write_text(path, changed.model_dump_json(indent=2, exclude_defaults=True) + "\n")
