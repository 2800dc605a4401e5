"""The statement of an attestation: which files ship, and from what each was made, and how.

It is an in-toto statement (https://in-toto.io/Statement/v1). Its subjects are the files that ship;
its predicate is a chain of links. A link names its inputs and outputs by digest, and the
parameters that, with the inputs, determine the outputs. So anybody who has the inputs can make the
outputs again, and nobody needs to believe the statement.

The file is canonical: one JSON text for one content. Each part of it carries a digest, so that an
edit is found and its place named. The digests are no signature, since whoever edits the statement
can compute them anew: sign the file with a tool made for it. That every subject leads back to a
base model and rotations is checked whatever the digests say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, StringConstraints, ValidationError

from so8tqc.checkpoints.provenance import Provenance
from so8tqc.disk.atomic import write_text
from so8tqc.disk.digests import sha256_json
from so8tqc.disk.foreign import read_whole
from so8tqc.errors import InputError
from so8tqc.records import Frozen

STATEMENT_TYPE: Literal["https://in-toto.io/Statement/v1"] = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Literal["urn:so8tqc:derivation:v1"] = "urn:so8tqc:derivation:v1"
STATEMENT_NAME = "attestation.json"

BASE, ROTATIONS, IMPORTANCE, HESSIANS = "base", "rotations", "imatrix", "hessians"
_ADAPTER = re.compile(r"adapter_[1-9][0-9]*")
WEIGHING = {IMPORTANCE: "importance matrix", HESSIANS: "file of second moments"}
"""What a quantization may have been weighed by: inputs that it need not have."""


def adapter_name(place: int) -> str:
    """Name of the input that is an adapter of a bake; its place counts from 1."""
    return f"adapter_{place}"


def is_adapter(name: str) -> bool:
    """Whether an input's name is that of an adapter."""
    return _ADAPTER.fullmatch(name) is not None


def adapter_names(link: Link) -> list[str]:
    """Names of a bake's adapters, in the order in which they apply."""
    count = sum(is_adapter(entry.name) for entry in link.inputs)
    return [adapter_name(i) for i in range(1, count + 1)]


def applied_inputs(provenance: Provenance, *, rotations_given: bool) -> dict[str, str]:
    """What a bake applied to its base: name of the input → fingerprint.

    Args:
        provenance: of the baked directory.
        rotations_given: whether the bake was given rotations, which may be the first adapter;
            else there are only adapters, or the base holds its own gates.
    """
    beside = [adapter.sha256 for adapter in provenance.adapters]
    applied = {}
    if rotations_given and not beside:
        applied[ROTATIONS] = provenance.rotations_fingerprint
    elif rotations_given:
        applied[ROTATIONS] = provenance.gates_fingerprint or beside.pop(0)
    return applied | {adapter_name(i): digest for i, digest in enumerate(beside, start=1)}


OUTSIDE = "outside"
"""Parameter of a link: names of its inputs that the statement does not say the making of."""


def from_outside(link: Link) -> frozenset[str]:
    """The names of a quantization's inputs that the statement says nothing about."""
    names = link.parameters.get(OUTSIDE)
    if link.kind != "quantize" or not isinstance(names, list):
        return frozenset()
    return frozenset(str(name) for name in names)


def is_external(kind: str, name: str) -> bool:
    """Whether an input of this name is one that no link of the statement makes."""
    if kind == "bake":
        return name in (BASE, ROTATIONS) or is_adapter(name)
    return kind == "quantize" and name in WEIGHING


Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


_AGAIN = "Get the statement again from where the files come from."


class StoredTensor(Frozen):
    """A tensor in a file: how it is stored, and the SHA-256 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: Sha256


class Digest(Frozen):
    """SHA-256 of a file's bytes; of ``base``, ``rotations`` and adapters the bake's fingerprint."""

    sha256: Sha256


class Annotations(Frozen):
    """What is known of a file of weights beyond its digest, to name the place of an edit.

    Attributes:
        tensors: name → how and what is stored.
        keys: key-value of a GGUF file → SHA-256 of its type and value.
    """

    tensors: dict[str, StoredTensor]
    keys: dict[str, Sha256] = Field(default_factory=dict)


class Resource(Frozen):
    """An in-toto resource descriptor: a file by its name and digest.

    Attributes:
        name: relative to the directory that was attested, or ``base``, ``rotations``,
            ``adapter_1`` and so on, ``imatrix``, ``hessians``.
        digest: of its bytes.
        annotations: of a file of weights that a link makes.
    """

    name: str
    digest: Digest
    annotations: Annotations | None = None

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Its tensors, none for a file without weights."""
        return {} if self.annotations is None else self.annotations.tensors


class Link(Frozen):
    """One step: these inputs with these parameters make these outputs.

    Attributes:
        name: for people, e.g. ``quantize Q5_K_M``.
        kind: which step.
        inputs, outputs: files.
        parameters: all that determines the outputs beside the inputs; see
            ``services.attest.remake``.
        verdict: of the stage's own checks.
    """

    name: str
    kind: Literal["bake", "export", "quantize", "calibrate"]
    inputs: tuple[Resource, ...]
    outputs: tuple[Resource, ...]
    parameters: dict[str, JsonValue]
    verdict: Literal["pass", "fail", "skip"]


class Seals(Frozen):
    """SHA-256 of the canonical JSON of each part: subjects, each link, records, versions."""

    subject: Sha256
    links: dict[str, Sha256]
    records: Sha256
    versions: Sha256


class Predicate(Frozen):
    """What the subjects were made from.

    Attributes:
        schema_version: of this predicate.
        links: in the order in which they were made.
        records: of the stages, what was measured and judged.
        versions: of what made them.
        seals: digests of the parts.
    """

    schema_version: Literal[1] = 1
    links: tuple[Link, ...]
    records: tuple[Resource, ...]
    versions: dict[str, str]
    seals: Seals


class Statement(Frozen):
    """An in-toto statement with so8tqc's predicate."""

    type: Literal["https://in-toto.io/Statement/v1"] = Field(STATEMENT_TYPE, alias="_type")
    subject: tuple[Resource, ...]
    predicateType: Literal["urn:so8tqc:derivation:v1"] = PREDICATE_TYPE  # noqa: N815
    predicate: Predicate

    @property
    def outputs(self) -> Iterator[Resource]:
        """Every file that a link makes."""
        return (output for link in self.predicate.links for output in link.outputs)


def seal(
    links: tuple[Link, ...], records: tuple[Resource, ...], versions: dict[str, str]
) -> Statement:
    """A statement about all that the links make, with the digests of its parts.

    Raises:
        InputError: the links do not lead from base and rotations or adapters to every subject.
    """
    subject = tuple(
        Resource(name=output.name, digest=output.digest)
        for link in links
        for output in link.outputs
    )
    parts = Predicate(
        links=links,
        records=records,
        versions=versions,
        seals=_seals(subject, links, records, versions),
    )
    statement = Statement(subject=subject, predicate=parts)
    require_chain(statement)
    return statement


def write_statement(path: Path, statement: Statement) -> None:
    """Write it in its canonical form, atomically."""
    write_text(path, _canonical(statement))


def read_statement(path: Path) -> Statement:
    """Read a statement and refuse it if it was edited, or its chain is broken.

    Raises:
        InputError: no statement, edited (the message says where), or broken.
    """
    text = _text(path)
    statement = _parsed(text, path)
    canonical = _canonical(statement)
    if text != canonical:
        raise InputError(
            "edited after it was written: it is not in the form that attest writes",
            where=f"{path}, line {_first_difference(text, canonical)}",
            remedy=_AGAIN,
        )
    broken = _broken_seals(statement)
    if broken:
        raise InputError(
            f"edited after it was written: {', '.join(broken)} or its digest",
            where=str(path),
            remedy=_AGAIN,
        )
    require_chain(statement, str(path))
    return statement


def require_chain(statement: Statement, where: str | None = None) -> None:
    """Every subject is made by a link, and every input by an earlier one, with the same digest.

    Raises:
        InputError: a link is missing, out of order or twice, or two files were exchanged.
    """
    for what in _breaks(statement):
        raise InputError(f"the chain is broken: {what}", where=where)


def _breaks(statement: Statement) -> Iterator[str]:
    """What is wrong with the chain, in the order of its links."""
    made: dict[str, str] = {}
    names = [link.name for link in statement.predicate.links]
    if len(set(names)) < len(names):
        yield "two links have one name"
    for link in statement.predicate.links:
        yield from _breaks_of(link, made)
        made |= {output.name: output.digest.sha256 for output in link.outputs}
    subjects = {subject.name: subject.digest.sha256 for subject in statement.subject}
    if len(subjects) < len(statement.subject):
        yield "a file is a subject twice"
    for name in sorted(subjects.keys() | made.keys()):
        if name not in made:
            yield f"no link makes the subject {name}"
        elif name not in subjects:
            yield f"{name} is made but is no subject"
        elif subjects[name] != made[name]:
            yield f"the subject {name} is not the file that its link makes"


def _breaks_of(link: Link, made: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with one link.

    Args:
        link: the link.
        made: name → digest of what earlier links make.
    """
    if link.kind == "bake":
        yield from _unsaid(link)
    if not link.inputs or not link.outputs:
        yield f"{link.name!r} has no input or no output"
    for entry in link.inputs:
        if is_external(link.kind, entry.name) or entry.name in from_outside(link) - made.keys():
            continue
        if entry.name not in made:
            yield f"no link before {link.name!r} makes its input {entry.name}"
        elif made[entry.name] != entry.digest.sha256:
            yield f"{link.name!r} was made from another {entry.name} than the one made before"
    for output in link.outputs:
        if output.name in made:
            yield f"two links make {output.name}"


def _unsaid(link: Link) -> Iterator[str]:
    """What a bake must say and does not: its base, rotations or adapters, each adapter once."""
    given = [entry.name for entry in link.inputs]
    adapters = [name for name in given if is_adapter(name)]
    if BASE not in given:
        yield f"{link.name!r} does not say its {BASE}"
    if ROTATIONS not in given and not adapters:
        yield f"{link.name!r} does not say its {ROTATIONS}"
    if sorted(adapters) != sorted(adapter_name(i + 1) for i in range(len(adapters))):
        yield f"{link.name!r} does not say all of its adapters, each once"


def _seals(
    subject: Sequence[Resource],
    links: Sequence[Link],
    records: Sequence[Resource],
    versions: Mapping[str, str],
) -> Seals:
    return Seals(
        subject=sha256_json([entry.model_dump(mode="json") for entry in subject]),
        links={link.name: sha256_json(link.model_dump(mode="json")) for link in links},
        records=sha256_json([entry.model_dump(mode="json") for entry in records]),
        versions=sha256_json(dict(versions)),
    )


def _broken_seals(statement: Statement) -> list[str]:
    """The parts whose digest is not the one that the statement gives."""
    predicate = statement.predicate
    real = _seals(statement.subject, predicate.links, predicate.records, predicate.versions)
    broken = [
        f"the link {name!r}"
        for name in sorted(real.links.keys() | predicate.seals.links.keys())
        if real.links.get(name) != predicate.seals.links.get(name)
    ]
    if real.subject != predicate.seals.subject:
        broken.append("the list of subjects")
    for part in ("records", "versions"):
        if getattr(real, part) != getattr(predicate.seals, part):
            broken.append(f"the {part}")
    return broken


def _canonical(statement: Statement) -> str:
    content = statement.model_dump(mode="json", by_alias=True)
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _text(path: Path) -> str:
    content = read_whole(path)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            "edited after it was written: not UTF-8",
            where=f"{path}, byte {error.start}",
            remedy=_AGAIN,
        ) from None


def _parsed(text: str, path: Path) -> Statement:
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        raise InputError(
            f"no JSON: {error}", where=f"{path}, line {line}" if line else str(path)
        ) from None
    if not isinstance(content, dict) or content.get("_type") != STATEMENT_TYPE:
        raise InputError(
            f"not an in-toto statement (_type {STATEMENT_TYPE})",
            where=str(path),
            remedy="so8tqc attest DIR writes one.",
        )
    try:
        return Statement.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"not a statement of so8tqc: {first['msg']}", where=f"{path}, {place}"
        ) from None


def _first_difference(text: str, canonical: str) -> int:
    """Line number at which two texts differ."""
    for number, (a, b) in enumerate(zip(text.split("\n"), canonical.split("\n"), strict=False), 1):
        if a != b:
            return number
    return min(text.count("\n"), canonical.count("\n")) + 1
