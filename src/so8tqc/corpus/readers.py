"""From a package's files to documents: a title, tags, and sections of prose paragraphs."""

from __future__ import annotations

import gettext
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from so8tqc.corpus.lyx import read_lyx
from so8tqc.corpus.manifest import Part
from so8tqc.corpus.markup import html_sections, markdown_sections, plain
from so8tqc.errors import DataError


@dataclass(frozen=True)
class Document:
    """A document of one source.

    Attributes:
        name: distinct within its file.
        tags: what its source says of it: topic, description, place in a manual.
        sections: each a list of paragraphs; a passage never crosses a section's end.
    """

    name: str
    tags: tuple[str, ...]
    sections: tuple[tuple[str, ...], ...]


def documents(part: Part, content: bytes, where: str) -> Iterator[Document]:
    """The documents of one file.

    Raises:
        DataError: the file is not what its reader expects.
    """
    try:
        yield from _READERS[part.reader](content, part.keys)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, IndexError) as error:
        raise DataError(
            f"the reader {part.reader!r} cannot read it: {type(error).__name__}: {error}",
            where=where,
        ) from None


def _html(content: bytes, _keys: tuple[str, ...]) -> Iterator[Document]:
    tags, sections = html_sections(content.decode("utf-8"))
    yield Document("", tags, sections)


def _markdown(content: bytes, _keys: tuple[str, ...]) -> Iterator[Document]:
    yield Document("", (), markdown_sections(content.decode("utf-8")))


def _text(content: bytes, _keys: tuple[str, ...]) -> Iterator[Document]:
    yield Document("", (), (_blocks(content.decode("utf-8")),))


def _lyx(content: bytes, _keys: tuple[str, ...]) -> Iterator[Document]:
    yield Document("", (), read_lyx(content.decode("utf-8")))


def _records(content: bytes, _keys: tuple[str, ...]) -> Iterator[Document]:
    """Records parted by lines of ``%%%%``: a name, an empty line, a description."""
    for record in re.split(r"^%%%%.*$", content.decode("utf-8"), flags=re.MULTILINE):
        name, _, body = record.strip().partition("\n")
        if body and not re.search(r"[{}<>]", body):
            yield Document(name, (), (_blocks(body, joined=True),))


def _catalog(content: bytes, _keys: tuple[str, ...]) -> Iterator[Document]:
    """A gettext catalogue: each translated message a document, named by its place."""
    catalog: dict[Any, str] = gettext.GNUTranslations(io.BytesIO(content))._catalog  # type: ignore[attr-defined]  # typeshed hides it, and there is no other way to list the messages
    messages = sorted((key, value) for key, value in catalog.items() if isinstance(key, str))
    for number, (key, value) in enumerate(messages):
        if key and "%" not in value:
            yield Document(str(number), (key,), (_blocks(plain(value)),))


def _json_text(content: bytes, keys: tuple[str, ...]) -> Iterator[Document]:
    """JSON in which ``keys`` lead to texts.

    A key ``*`` stands for every entry (each a document, named by it). The last key may be
    ``FIELD:TAG,TAG``, where the text is in one field and tags are in others. The World Factbook
    parts its paragraphs by ``++``.
    """
    *path, last = keys
    field, _, tags = last.partition(":")
    for name, value in _walk(json.loads(content), path, ""):
        if isinstance(value, dict) and isinstance(value.get(field), str):
            found = tuple(str(value.get(tag, "")) for tag in tags.split(",") if tag)
            yield Document(name, found, (_blocks(value[field].replace(" ++ ", "\n\n")),))


def _json_html(content: bytes, keys: tuple[str, ...]) -> Iterator[Document]:
    """Documents as :func:`_json_text` reads them, where the text is HTML."""
    *path, field = keys
    for name, value in _walk(json.loads(content), path, ""):
        if isinstance(value, dict) and isinstance(value.get(field), str):
            tags, sections = html_sections(value[field])
            yield Document(name, tags, sections)


def _jsonl(content: bytes, keys: tuple[str, ...]) -> Iterator[Document]:
    """Lines of JSON; keys: the field of the name (which must match), of the text, the match."""
    name, text, wanted = keys
    for line in content.decode("utf-8").splitlines():
        item = json.loads(line)
        if re.search(wanted, item[name]):
            paragraphs = tuple(part.strip() for part in item[text].splitlines() if part.strip())
            yield Document(item[name], (), (paragraphs,))


def _walk(value: Any, path: list[str], name: str) -> Iterator[tuple[str, Any]]:
    if not path:
        yield name, value
    elif isinstance(value, dict) and path[0] == "*":
        for key in sorted(value):
            yield from _walk(value[key], path[1:], f"{name}/{key}".lstrip("/"))
    elif isinstance(value, dict) and path[0] in value:
        yield from _walk(value[path[0]], path[1:], name)


def _blocks(text: str, joined: bool = False) -> tuple[str, ...]:
    """Paragraphs parted by empty lines; ``joined``: their lines are joined without a space."""
    glue = "" if joined else " "
    blocks = re.split(r"\n\s*\n", text.replace("\r\n", "\n"))
    return tuple(
        glue.join(line.strip() for line in block.splitlines()) for block in blocks if block.strip()
    )


_READERS: dict[str, Callable[[bytes, tuple[str, ...]], Iterator[Document]]] = {
    "catalog": _catalog,
    "html": _html,
    "json-html": _json_html,
    "json-text": _json_text,
    "jsonl": _jsonl,
    "lyx": _lyx,
    "markdown": _markdown,
    "records": _records,
    "text": _text,
}
