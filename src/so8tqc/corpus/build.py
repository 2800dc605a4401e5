"""The calibration set as bytes: the same from the same packages and texts, on every machine."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from so8tqc.corpus.archives import matches, members
from so8tqc.corpus.manifest import CorpusManifest, Domain, Part, Result, Source
from so8tqc.corpus.passages import (
    CHARACTERS_JA,
    WORDS_EN,
    Passage,
    length,
    pack,
    without_duplicates,
)
from so8tqc.corpus.readers import Document, documents
from so8tqc.errors import DataError

WRITTEN = "written"


def passages_of(source: Source, path: Path, seed: int) -> list[Passage]:
    """What one package gives: read, put into domains, cut into passages, limited by part.

    Raises:
        DataError: it is no archive, states another licence, or lacks a file.
    """
    # unpacked once: a package takes seconds
    patterns = tuple(pattern for part in source.parts for pattern in part.files)
    licence = glob.escape(source.licence_file)
    files = dict(members(path.read_bytes(), (licence, *patterns), source.file))
    _verify_licence(source, files.get(source.licence_file))
    found: list[Passage] = []
    for number, part in enumerate(source.parts):
        some = list(_part_passages(source, part, number, files))
        if not some:
            raise DataError(
                f"nothing was found in {', '.join(part.files)}",
                where=f"{source.name} {source.version}",
            )
        some.sort(key=lambda passage: _draw(seed, passage.id))
        found += some[: part.limit]
    return found


def select(
    manifest: CorpusManifest, written: Sequence[Passage], packaged: Sequence[Passage]
) -> bytes:
    """The set: what is written for the project, and of the rest ``quota`` in each cell.

    Written texts come first, so that a duplicate of one goes; then passages in an order drawn by
    hashes of seed and id, which depends on neither the packages' order nor a random generator.

    Returns:
        JSON lines, sorted by language, domain and id; UTF-8.
    """
    drawn = sorted(packaged, key=lambda passage: _draw(manifest.seed, passage.id))
    counts: Counter[tuple[str, Domain]] = Counter()
    chosen: list[Passage] = []
    for passage in without_duplicates([*written, *drawn]):
        if passage.source != WRITTEN:
            cell = (passage.language, passage.domain)
            if counts[cell] >= manifest.quota[passage.language]:
                continue
            counts[cell] += 1
        chosen.append(passage)
    chosen.sort(key=lambda passage: (passage.language, passage.domain, passage.id))
    lines = (json.dumps(_line(passage), ensure_ascii=False) for passage in chosen)
    return "".join(line + "\n" for line in lines).encode()


def result_of(content: bytes) -> Result:
    """Digest and counts of a built set."""
    counts: dict[str, dict[str, int]] = {}
    rows = [json.loads(line) for line in content.decode().splitlines()]
    for row in rows:
        cell = counts.setdefault(row["language"], {})
        cell[row["category"]] = cell.get(row["category"], 0) + 1
    return Result(sha256=hashlib.sha256(content).hexdigest(), samples=len(rows), counts=counts)


def _line(passage: Passage) -> dict[str, str]:
    fields = {
        "id": passage.id,
        "language": passage.language,
        "category": str(passage.domain),
        "text": passage.text,
        "prompt": passage.prompt,
        "source": passage.source,
        "licence": passage.licence,
        "title": passage.title,
    }
    return {key: value for key, value in fields.items() if value}


def _verify_licence(source: Source, stated: bytes | None) -> None:
    where = f"{source.name} {source.version}: {source.licence_file}"
    if stated is None:
        raise DataError("the file that states the licence is not there", where=where)
    text = " ".join(stated.decode("utf-8", "replace").split())
    if source.licence_phrase not in text:
        raise DataError(f"does not say {source.licence_phrase!r}", where=where)


def _part_passages(
    source: Source, part: Part, number: int, files: Mapping[str, bytes]
) -> Iterator[Passage]:
    least, most = WORDS_EN if part.language == "en" else CHARACTERS_JA
    for member, data in files.items():
        if not matches(member, part.files):
            continue
        file = member.rpartition("/")[2]
        for document in documents(part, data, f"{source.name}: {member}"):
            domain = part.domain or _domain(part, document)
            if domain is None:
                continue
            texts = [text for section in document.sections for text in pack(section, part.language)]
            for index, text in enumerate(texts):
                if part.only and not re.search(part.only, text):
                    continue
                # with the empty lines between its paragraphs, which pack does not count
                if not least <= length(text, part.language) <= most:
                    continue
                name = f"{source.package}/{number}/{file}/{document.name}/{index}"
                yield Passage(
                    id=f"{part.language}/{name}",
                    text=text,
                    language=part.language,
                    domain=domain,
                    source=source.name,
                    licence=source.licence,
                    title=document.name or file,
                )


def _domain(part: Part, document: Document) -> Domain | None:
    for rule in part.rules:
        rest = [tag for tag in document.tags if not (rule.tag and re.fullmatch(rule.tag, tag))]
        if rule.tag and len(rest) == len(document.tags):
            continue
        if re.search(rule.pattern, " · ".join((document.name, *rest)), re.IGNORECASE):
            return rule.domain
    return None


def _draw(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}".encode()).digest()
