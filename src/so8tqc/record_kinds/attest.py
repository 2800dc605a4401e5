"""Statements and their verification, files made again, and runs hashed again."""

from __future__ import annotations

from enum import StrEnum

from typing_extensions import TypedDict

from so8tqc.record_kinds.base import Metrics
from so8tqc.record_kinds.quantize import Build


class Likeness(StrEnum):
    """How a tensor, or a link of a statement, compares with the one made again."""

    IDENTICAL = "identical"
    WITHIN_ROUNDING = "within rounding"
    DIFFERENT = "different"
    NOT_CHECKED = "not checked"


class AttestedLink(TypedDict):
    """A link of a statement: how much goes in and comes out."""

    kind: str
    inputs: int
    outputs: int


class AttestMetrics(Metrics):
    """Of kind ``attest``; ``subjects``: file → SHA-256."""

    links: dict[str, AttestedLink]
    subjects: dict[str, str]


class VerifiedLink(TypedDict):
    """What became of a link that was made again, and what was seen."""

    found: str
    text: str


class StatedFile(TypedDict):
    """``identical``, ``different`` (in ``parts``) or ``absent``."""

    state: str
    parts: list[str] | None


class ComparedTensor(TypedDict):
    """A tensor that is not identical; ``blocks`` of it differ (None: another type or shape)."""

    link: Likeness
    blocks: int | None


class Builds(TypedDict):
    """The libllama of a record and the one that is here."""

    recorded: Build
    here: Build
    same: bool


class VerifyMetrics(Metrics):
    """Of kind ``verify``.

    Of a statement: ``links`` and ``files`` by name. Of a file made again: ``tensors`` (likeness →
    number), ``not_identical`` and ``build``.
    """

    links: dict[str, VerifiedLink] | None = None
    files: dict[str, StatedFile] | None = None
    tensors: dict[str, int] | None = None
    not_identical: dict[str, ComparedTensor] | None = None
    build: Builds | None = None


class RecheckMetrics(Metrics):
    """Of kind ``recheck``: path → ``unchanged``, ``changed`` or ``missing``."""

    files: dict[str, str]
