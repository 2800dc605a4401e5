"""Texts in, token ids out. Reads JSON, JSONL and plain text."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from so8tqc.config import (
    CALIBRATION_TEXTS,
    LONG_TEXTS,
    PICTURES,
    QUALITY_TEXTS,
    QUICK_LONG_TEXTS,
    QUICK_TEXTS,
)
from so8tqc.corpus.store import calibration_file
from so8tqc.disk.foreign import MAX_JSON_BYTES, read_whole
from so8tqc.errors import DataError, ModelError
from so8tqc.resources import data_file
from so8tqc.sources.inputs import drawn
from so8tqc.sources.inputs.dataset_texts import PREFIX, dataset_file
from so8tqc.sources.protocol import EncodedText, TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILTIN_FILES = {
    QUALITY_TEXTS: ("validation_en.json", "validation_ja.json"),
    QUICK_TEXTS: ("validation_en.json", "validation_ja.json"),
    LONG_TEXTS: ("longtext_en.json",),
    QUICK_LONG_TEXTS: ("longtext_en.json",),
}
_TAKEN = {QUICK_TEXTS: 5, QUICK_LONG_TEXTS: 1}
"""Texts taken of each file, the first ones; of another set all."""

_MAX_FILE_BYTES = 128 << 20
"""Bytes of a text file at most: decoded it may be four times as large in memory."""

_MAX_TEXTS = 500_000
"""Texts of one file at most."""

_SHOWN = 300  # characters of another library's message

_PARALLEL_KEYS = ("ids", "prompts", "descriptions", "categories", "languages")


@dataclass(frozen=True)
class Text:
    """One text with what is known of it.

    Attributes:
        id: unique within the loaded set.
        text: the passage.
        prompt: what the passage answers, "" if there is none.
        language: ISO 639-1 code, "" if unknown.
        category: domain, "" if unknown.
        description: one sentence for reports.
        messages: of a conversation, in place of a passage: ``role``, ``content`` and what else its
            chat template knows.
        images: files, or names of the built-in set: where each ``<image>`` of prompt and passage
            stands, or in front of both.
        where: file and line, of a text with pictures.
    """

    id: str
    text: str
    prompt: str = ""
    language: str = ""
    category: str = ""
    description: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    images: tuple[str, ...] = ()
    where: str = ""

    @property
    def full(self) -> str:
        """The prompt, an empty line, the passage; or the passage alone.

        Raises:
            DataError: it is a conversation, which only its model's chat template makes a text.
        """
        if self.messages:
            raise DataError(
                "holds messages, which are no text without a chat template",
                where=self.id,
                remedy="Give --chat (qc, capture, calibrate), or rows with a text.",
            )
        return f"{self.prompt}\n\n{self.text}" if self.prompt else self.text


class TextsRead(NamedTuple):
    """Texts, and what is to be said of the files they came from."""

    texts: tuple[Text, ...]
    notices: tuple[str, ...]


def data_paths(specs: Sequence[str]) -> tuple[Path, ...]:
    """The files that a list of paths, ``builtin:NAME`` and ``datasets:NAME`` stands for.

    Raises:
        DataError: an unknown builtin name, or a file that does not exist.
        MissingToolError: ``builtin:calibration`` has not been built, or no ``datasets``.
        ToolError: a data set cannot be fetched.
    """
    paths: list[Path] = []
    for spec in specs:
        if spec == PICTURES:
            paths.append(Path(drawn.__file__))  # which draws them, and says what they show
        elif spec == CALIBRATION_TEXTS:
            paths.append(calibration_file())
        elif spec.startswith(PREFIX):
            paths.append(dataset_file(spec))
        elif spec.startswith("builtin:"):
            if spec not in BUILTIN_FILES:
                raise DataError(
                    f"no built-in data set {spec!r}",
                    remedy=f"There are {', '.join((*BUILTIN_FILES, CALIBRATION_TEXTS, PICTURES))}.",
                )
            paths += [data_file(name) for name in BUILTIN_FILES[spec]]
        else:
            path = Path(spec)
            if not path.is_file():
                raise DataError("no such data file", where=spec)
            paths.append(path)
    return tuple(paths)


def input_paths(specs: Sequence[str]) -> tuple[Path, ...]:
    """All files that the data depend on: those of :func:`data_paths`, and pictures that they name.

    Raises:
        DataError, MissingToolError, ToolError: as there.
    """
    paths = data_paths(specs)
    lines = [path for path in paths if path.suffix.lower() == ".jsonl"]
    named = [Path(name) for path in lines for text in _read(path) for name in text.images]
    return (*paths, *dict.fromkeys(path for path in named if path.is_file()))


def load_texts(specs: Sequence[str]) -> tuple[Text, ...]:
    """The texts that :func:`read_texts` reads.

    Raises:
        DataError: as there.
    """
    return read_texts(specs).texts


def read_texts(specs: Sequence[str]) -> TextsRead:
    """Read every text of the given files and built-in sets.

    ``.json``: an object with the parallel lists ``texts`` and, optionally, ``ids``,
    ``prompts``, ``descriptions``, ``categories``, and a ``language`` or a list ``languages``; or a
    list of strings.
    ``.jsonl``: an object with ``text`` on each line. Anything else is one plain text. Rows without
    a word in them are passed over, and counted in a notice.

    Raises:
        DataError: a file is unreadable, not UTF-8, of another shape, or holds no text.
    """
    texts: list[Text] = []
    notices: list[str] = []
    for spec in specs:
        for path in data_paths((spec,)):
            rows = _pictures() if spec == PICTURES else _read(path)[: _TAKEN.get(spec)]
            used = [text for text in rows if text.text.strip() or text.messages]
            if blank := len(rows) - len(used):
                were = "row was" if blank == 1 else "rows were"
                notices.append(
                    f"{path.name}: {blank:,} blank {were} skipped, {len(used):,} are used."
                )
            for text in used:
                _require_unicode(text, path)
            texts += used
    if not texts:
        raise DataError(
            "there is no text in the data",
            where=", ".join(specs),
            remedy=" ".join((*notices, "Give a file that holds text.")),
        )
    return TextsRead(_with_names_of_their_own(texts), tuple(notices))


def _pictures() -> list[Text]:
    """The built-in pictures with their passages."""
    return [
        Text(
            f"images/{one.name}",
            one.text,
            prompt=one.prompt,
            language=one.language,
            category=one.category,
            images=(drawn.PREFIX + one.name,),
            where=f"{PICTURES}, {one.name}",
        )
        for one in drawn.drawings()
    ]


def _with_names_of_their_own(texts: Iterable[Text]) -> tuple[Text, ...]:
    counts: dict[str, int] = {}
    names: set[str] = set()
    unique: list[Text] = []
    for text in texts:
        name = text.id
        while name in names:
            counts[text.id] = counts.get(text.id, 1) + 1
            name = f"{text.id}#{counts[text.id]}"
        names.add(name)
        unique.append(text if name == text.id else replace(text, id=name))
    return tuple(unique)


def _require_unicode(text: Text, path: Path) -> None:
    r"""JSON can write half a character ("\ud800"), which no tokenizer and no file takes.

    Raises:
        DataError: the text, or what is known of it, holds one.
    """
    words = (text.id, text.prompt, text.text, text.language, text.category, text.description)
    for value in (*words, json.dumps(text.messages, ensure_ascii=False) if text.messages else ""):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"character {error.start} is half of a surrogate pair, and so no text",
                where=f"{path}, {text.id.encode('utf-8', 'replace').decode()}",
            ) from None


def _read(path: Path) -> list[Text]:
    is_json = path.suffix.lower() == ".json"  # whose objects are all in memory at once
    raw = read_whole(path, DataError, MAX_JSON_BYTES if is_json else _MAX_FILE_BYTES)
    try:
        content = raw.decode("utf-8-sig")  # line ends as they are
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 text: byte {error.start} cannot be decoded", where=str(path)
        ) from None
    match path.suffix.lower():
        case ".json":
            return _from_json(content, path)
        case ".jsonl":
            return _from_jsonl(content, path)
        case _:
            return [Text(path.stem, content)]


def _from_json(content: str, path: Path) -> list[Text]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", where=str(path)) from None
    if isinstance(value, list):
        value = {"texts": value}
    found = value.get("texts") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(found, list):
        raise DataError("expected an object with a list of strings 'texts'", where=str(path))
    passages = ["" if text is None else text for text in found]
    if not _strings(passages):
        raise DataError("expected an object with a list of strings 'texts'", where=str(path))
    count = len(passages)
    columns: dict[str, list[str]] = {}
    for key in _PARALLEL_KEYS:
        column = value.get(key, [""] * count)
        if not _strings(column) or len(column) != count:
            raise DataError(
                f"'{key}' must be a list of {count} strings, one for each text", where=str(path)
            )
        columns[key] = column
    languages = [each or str(value.get("language", "")) for each in columns["languages"]]
    return [
        Text(
            id=(f"{languages[i]}/" if languages[i] else "")
            + (columns["ids"][i] or f"{path.stem}-{i + 1}"),
            text=passages[i],
            prompt=columns["prompts"][i],
            language=languages[i],
            category=columns["categories"][i],
            description=columns["descriptions"][i],
        )
        for i in range(count)
    ]


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _from_jsonl(content: str, path: Path) -> list[Text]:
    texts: list[Text] = []
    # not splitlines: JSON's strings may hold U+2028 and others that end a line elsewhere
    for number, line in enumerate(io.StringIO(content, newline="\n"), start=1):
        where = f"{path}:{number}"
        if not line.strip():
            texts.append(Text(where, ""))
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON: {error}", where=where) from None
        messages = _messages(item, where) if isinstance(item, dict) else ()
        text = item.get("text", None if messages else 0) if isinstance(item, dict) else 0
        if text is not None and not isinstance(text, str):
            raise DataError("expected an object with a string 'text'", where=where)
        fields = {
            key: str(item.get(key, "") or "")
            for key in ("prompt", "language", "category", "description")
        }
        if len(texts) == _MAX_TEXTS:
            raise DataError(f"more than {_MAX_TEXTS:,} texts", where=where)
        name = str(item.get("id") or f"{path.stem}-{number}")
        images = _images(item, path.parent, where)
        if images and messages:
            raise DataError(
                "a conversation with pictures",
                where=where,
                remedy="Give its question as 'prompt' and its answer as 'text', beside 'images'.",
            )
        texts.append(
            Text(
                name,
                text or "",
                **fields,
                messages=messages,
                images=images,
                where=where if images else "",
            )
        )
    return texts


_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user"}
"""Roles of ShareGPT's rows."""


def _messages(item: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], ...]:
    """``messages`` of a row, or ``conversations`` with ``from`` and ``value``; () without both.

    Raises:
        DataError: they are no list of such objects.
    """
    if "messages" in item:
        rows = item["messages"]
    elif "conversations" in item:
        rows = item["conversations"]
        if isinstance(rows, list) and all(isinstance(r, dict) and "from" in r for r in rows):
            rows = [
                {
                    "role": _ROLES.get(str(row["from"]), str(row["from"])),
                    "content": row.get("value"),
                }
                for row in rows
            ]
    else:
        return ()
    good = isinstance(rows, list) and all(
        isinstance(row, dict)
        and isinstance(row.get("role"), str)
        and isinstance(row.get("content"), str | list | None)
        for row in rows
    )
    if not good:
        raise DataError("expected messages with a 'role' and a 'content'", where=where)
    return tuple(rows)


def _images(item: dict[str, Any], folder: Path, where: str) -> tuple[str, ...]:
    """The pictures of a row: ``image`` or ``images``, a path or several, from the file's folder.

    Raises:
        DataError: neither.
    """
    found = item.get("image", item.get("images"))
    named = [found] if isinstance(found, str) else found
    if named is None:
        return ()
    if not _strings(named) or not all(named) or ("image" in item and "images" in item):
        raise DataError("expected 'image' to be a path or a list of paths", where=where)
    return tuple(n if _is_no_path(n) else str(folder / n) for n in named)


def _is_no_path(name: str) -> bool:
    """Whether it is a name of the built-in set, or a place in a network, which is refused later."""
    return name.startswith((drawn.PREFIX, "data:")) or "://" in name


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; never remote code, never the network.

    Raises:
        ModelError: there is no usable tokenizer.
    """
    from transformers import AutoTokenizer

    if not path.is_dir():
        raise ModelError(
            "not a model directory", where=str(path), remedy="Give --tokenizer MODEL_DIRECTORY."
        )
    with _naming_the_tokenizer(str(path)):
        return AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    raise AssertionError("either it is returned, or something is raised")


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> TokenIds:
    """[T] ids of a text.

    Raises:
        ModelError: the tokenizer fails, which shows it to be malformed.
    """
    with _naming_the_tokenizer(str(tokenizer.name_or_path)):
        ids = tokenizer(text, verbose=False, **options)["input_ids"]
        return np.asarray(ids, dtype=np.int64)
    raise AssertionError("either they are returned, or something is raised")


@contextmanager
def _naming_the_tokenizer(where: str) -> Iterator[None]:
    """Any failure inside is that of a malformed tokenizer: its library raises bare exceptions, and
    panics, which are none."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # noqa: BLE001
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"no usable tokenizer: {reason[0][:_SHOWN] if reason else type(error).__name__}",
            where=where,
            remedy="Give --tokenizer MODEL_DIRECTORY.",
        ) from None


def encode(
    texts: Iterable[Text], tokenizer: PreTrainedTokenizerBase, max_tokens: int | None
) -> tuple[EncodedText, ...]:
    """Token ids of each text, cut to ``max_tokens``, special tokens as the tokenizer adds them.

    Raises:
        DataError: a text has fewer than two tokens, so that nothing is predicted; or pictures.
    """
    encoded: list[EncodedText] = []
    for text in texts:
        _require_no_pictures(text)
        ids = _token_ids(tokenizer, text.full)
        if ids.size < 2:
            raise DataError(
                f"has {ids.size} token(s); next-token statistics need at least two",
                where=text.id,
                remedy="Take this text out of the data, or give a longer one.",
            )
        encoded.append(EncodedText(text.id, ids[:max_tokens], text.language, text.category))
    return tuple(encoded)


def _require_no_pictures(text: Text) -> None:
    if text.images:
        raise DataError(
            "a text with pictures, which are not taken here",
            where=text.where,
            remedy="qc, capture, calibrate and longtext take pictures, text by text.",
        )


def concatenated(texts: Iterable[Text]) -> str:
    """All texts as one, an empty line between two, without the last line's end.

    Of a single plain text file this is what llama.cpp's tools read with ``-f``.
    """
    texts = tuple(texts)
    for text in texts:
        _require_no_pictures(text)
    return "\n\n".join(text.full for text in texts).removesuffix("\n")


def encode_plain(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[TokenIds, int | None]:
    """Token ids of a text in which the names of special tokens are plain text, and the BOS.

    Returns:
        [T] ids; the BOS id, None if the tokenizer does not put one in front.
    """
    tokens = _token_ids(tokenizer, text, split_special_tokens=True)
    bos = tokenizer.bos_token_id
    return tokens, bos if tokens.size and tokens[0] == bos else None
