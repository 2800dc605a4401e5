"""What a path is, by its content: its first bytes, its keys, its files. Nothing of it is run."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from so8tqc.disk.foreign import MAX_JSON_BYTES, read_whole
from so8tqc.disk.parts import part_name
from so8tqc.errors import ModelError, So8tqcError
from so8tqc.gguf.file import GGUFFile, open_part
from so8tqc.record_files import read_record
from so8tqc.wording import counted


class Kind(StrEnum):
    """What something is."""

    MISSING = "missing"
    EMPTY = "empty"
    GGUF = "gguf"
    GGUF_BROKEN = "gguf, broken"
    GGUF_PROJECTOR = "gguf, projector"
    GGUF_ADAPTER = "gguf, adapter"
    GGUF_IMPORTANCE = "gguf, importance matrix"
    GGUF_VOCABULARY = "gguf, vocabulary only"
    GGUF_FOLDER = "folder of gguf files"
    MODEL = "model directory"
    WEIGHTLESS = "model directory without weights"
    ADAPTER = "adapter"
    GATES = "gates"
    CAPTURE = "capture"
    WEIGHTS = "weights"
    RUN = "run directory"
    STAGE = "directory of a command"
    STATEMENT = "statement"
    RECORD = "record"
    TEMPERATURE = "temperature"
    TOKENIZER = "tokenizer"
    INDEX = "index of weights"
    CONFIG = "configuration"
    TEXT = "text"
    PICTURES = "pictures"
    ARCHIVE = "archive"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Thing:
    """Something that was recognised.

    Attributes:
        kind: what it is.
        path: where it is, perhaps inside what was given (the only GGUF file of a folder).
        what: the same as a sentence's beginning, for people.
        problem: why it cannot be read, "" if it can.
        gguf: its header, of a GGUF file.
    """

    kind: Kind
    path: Path
    what: str
    problem: str = ""
    gguf: GGUFFile | None = None


_PICTURES = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".svg"}
_MAGIC = {
    b"\x89PNG": (Kind.PICTURES, "a picture (PNG)"),
    b"\xff\xd8\xff": (Kind.PICTURES, "a picture (JPEG)"),
    b"GIF8": (Kind.PICTURES, "a picture (GIF)"),
    b"\x1f\x8b": (Kind.ARCHIVE, "a gzip archive"),
    b"BZh": (Kind.ARCHIVE, "a bzip2 archive"),
    b"\xfd7zXZ": (Kind.ARCHIVE, "an xz archive"),
    b"\x28\xb5\x2f\xfd": (Kind.ARCHIVE, "a zstd archive"),
    b"7z\xbc\xaf": (Kind.ARCHIVE, "a 7z archive"),
    b"%PDF": (Kind.UNKNOWN, "a PDF document"),
    b"\x7fELF": (Kind.UNKNOWN, "a program"),
}
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
    "spiece.model",
)  # fmt: skip
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_TEXTS = {".txt", ".md", ".jsonl", ".csv", ".rst"}
_TEXT_BYTES = 1 << 16


def recognise(path: Path) -> Thing:
    """Say what a path is."""
    try:
        if path.is_dir():
            return _directory(path)
        if not path.is_file():
            what = "neither a file nor a folder" if path.exists() else "nothing is here"
            return Thing(Kind.MISSING, path, what, f"there is no file and no folder {path}")
        if path.stat().st_size == 0:
            return Thing(Kind.EMPTY, path, "an empty file", "it holds no byte")
        return _file(path)
    except OSError as error:
        return Thing(Kind.MISSING, path, "not readable", f"{path}: {error.strerror}")
    except ValueError:  # a name with a NUL in it
        return Thing(Kind.MISSING, path, "nothing is here", "no file has such a name")


def _file(path: Path) -> Thing:
    with path.open("rb") as stream:
        start = stream.read(_TEXT_BYTES)
    for magic, (kind, what) in _MAGIC.items():
        if start.startswith(magic):
            return Thing(kind, path, what)
    if start.startswith(b"GGUF"):
        return _gguf(path)
    if start.startswith(b"PK"):
        return _zip(path)
    if _is_safetensors(path, start):
        return _safetensors(path)
    return _misnamed(path) or _by_content(path, start)


def _misnamed(path: Path) -> Thing | None:
    """What has the ending of a file of weights, and not its first bytes."""
    names = {".safetensors": "safetensors", ".gguf": "GGUF"}
    if (name := names.get(path.suffix.lower())) is None:
        return None
    problem = f"its first bytes are not those of a {name} file"
    return Thing(Kind.UNKNOWN, path, f"no {name} file, whatever its name", problem)


def _by_content(path: Path, start: bytes) -> Thing:
    if start[:1] == b"\x80":
        return Thing(Kind.GATES, path, "a torch file (pickle, read as data only)")
    if start.lstrip()[:1] in (b"{", b"["):
        return _json(path)
    return _text(path, start)


def _gguf(path: Path) -> Thing:
    try:
        header = open_part(path)
    except ModelError as error:
        what = "a GGUF file that is cut off or damaged"
        return Thing(Kind.GGUF_BROKEN, path, what, error.what)
    fields = header.fields
    kind = str(fields.get("general.type", ""))
    architecture = header.architecture
    if kind == "adapter" or "adapter.type" in fields:
        method = str(fields.get("adapter.type", "lora")).upper()
        return Thing(Kind.GGUF_ADAPTER, path, f"a {method} adapter as GGUF", gguf=header)
    if kind == "imatrix" or any(key.startswith("imatrix.") for key in fields):
        return Thing(Kind.GGUF_IMPORTANCE, path, "an importance matrix", gguf=header)
    if kind == "mmproj" or architecture == "clip":
        what = "a projector (mmproj): how pictures or sound enter another GGUF file's model"
        return Thing(Kind.GGUF_PROJECTOR, path, what, gguf=header)
    if not header.tensors and "tokenizer.ggml.model" in fields:
        return Thing(Kind.GGUF_VOCABULARY, path, "a vocabulary without weights", gguf=header)
    return Thing(Kind.GGUF, path, "a GGUF file", gguf=header)


def _zip(path: Path) -> Thing:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        return Thing(Kind.ARCHIVE, path, "a damaged zip archive", str(error))
    if any(name.endswith("data.pkl") for name in names):
        return Thing(Kind.GATES, path, "a torch file (read as data only)")
    if names and all(name.endswith(".npy") for name in names):
        return Thing(Kind.UNKNOWN, path, f"numpy arrays ({', '.join(names[:4])})")
    return Thing(Kind.ARCHIVE, path, "a zip archive")


def _is_safetensors(path: Path, start: bytes) -> bool:
    if len(start) < 9 or start[8:9] != b"{":
        return False
    (length,) = struct.unpack("<Q", start[:8])
    return bool(length < 1 << 32) or path.suffix == ".safetensors"


def _safetensors(path: Path) -> Thing:
    from so8tqc.checkpoints.safetensors_index import read_header, read_metadata
    from so8tqc.sources.capture import VERSION_KEY

    try:
        names = [entry.name for entry in read_header(path)]
        metadata = read_metadata(path)
    except ModelError as error:
        return Thing(
            Kind.UNKNOWN, path, "a safetensors file that is cut off or damaged", error.what
        )
    if VERSION_KEY in metadata:
        return Thing(Kind.CAPTURE, path, "recorded logits (a capture)")
    if _beside(path, "config.json") and path.name.startswith("model"):
        return Thing(Kind.WEIGHTS, path, "the weights of a model directory, one of its files")
    if path.name.startswith("adapter_model") and _beside(path, "adapter_config.json"):
        return Thing(Kind.ADAPTER, path.parent, "an adapter (PEFT)")
    kind = Kind.GATES if _may_hold_gates(names, metadata) else Kind.WEIGHTS
    what = "a gate file" if kind is Kind.GATES else "tensors without a model around them"
    return Thing(kind, path, what)


def _may_hold_gates(names: list[str], metadata: Mapping[str, str]) -> bool:
    from so8tqc.rotations.files.names import looks_like_a_gate

    return any(key.startswith("so8t.") for key in metadata) or any(map(looks_like_a_gate, names))


def _beside(path: Path, name: str) -> bool:
    return (path.parent / name).is_file()


def _json(path: Path) -> Thing:
    try:
        content = json.loads(read_whole(path, limit=MAX_JSON_BYTES))
    except (So8tqcError, ValueError, RecursionError) as error:
        if path.suffix == ".jsonl":
            return Thing(Kind.TEXT, path, "lines of JSON")
        return Thing(Kind.TEXT, path, "text that begins as JSON", str(error).splitlines()[0])
    if not isinstance(content, dict):
        return Thing(Kind.TEXT, path, "a JSON list")
    return Thing(_json_kind(path, content), path, _JSON_WORDS[_json_kind(path, content)])


_JSON_WORDS = {
    Kind.STATEMENT: "a statement of attest",
    Kind.RECORD: "a record of so8tqc",
    Kind.TEMPERATURE: "a temperature that calibrate has fitted",
    Kind.INDEX: "the index of a sharded model's weights",
    Kind.CONFIG: "a configuration file of a model or an adapter",
    Kind.TOKENIZER: "a tokenizer's file",
    Kind.TEXT: "a JSON file",
}


def _json_kind(path: Path, content: Mapping[str, Any]) -> Kind:
    told = {
        Kind.STATEMENT: str(content.get("_type", "")).startswith("https://in-toto.io/"),
        Kind.RECORD: {"schema_version", "kind", "verdict", "run"} <= content.keys(),
        Kind.TEMPERATURE: {"temperature", "fitted", "objective"} <= content.keys(),
        Kind.INDEX: "weight_map" in content,
        Kind.TOKENIZER: {"model", "added_tokens"} <= content.keys()
        or path.name in _TOKENIZER_FILES,
        Kind.CONFIG: "model_type" in content or "peft_type" in content,
    }
    return next((kind for kind, is_so in told.items() if is_so), Kind.TEXT)


def _text(path: Path, start: bytes) -> Thing:
    if b"\0" in start:
        return Thing(Kind.UNKNOWN, path, "binary data of a kind that is not known here")
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.end < len(start) - 4:  # not just a character that the reading has cut
            return Thing(Kind.UNKNOWN, path, "binary data of a kind that is not known here")
    if path.suffix in (".yaml", ".yml"):
        return Thing(Kind.CONFIG, path, "a YAML file")
    return Thing(Kind.TEXT, path, "a text file")


def _directory(path: Path) -> Thing:
    files = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    if not files:
        return Thing(Kind.EMPTY, path, "an empty folder", "it holds no file")
    names = {p.name for p in files}
    weights = [p for p in files if p.suffix in _WEIGHTS and p.is_file()]
    if "config.json" in names:
        return _model(path, files, weights)
    inside = [path, *(p for p in files if p.is_dir())]
    told = {
        Kind.RUN: "manifest.json" in names and any((p / "record.json").is_file() for p in files),
        Kind.ADAPTER: any((p / "adapter_config.json").is_file() for p in inside),
        Kind.STAGE: "record.json" in names and _readable_record(path / "record.json"),
    }
    kind = next((kind for kind, is_so in told.items() if is_so), None)
    return _folder(path, files, weights) if kind is None else Thing(kind, path, _FOLDER_WORDS[kind])


_FOLDER_WORDS = {
    Kind.RUN: "a run directory",
    Kind.ADAPTER: "an adapter (PEFT)",
    Kind.STAGE: "the directory of a command",
}


def _model(path: Path, files: list[Path], weights: list[Path]) -> Thing:
    readable = any(p.suffix == ".safetensors" for p in weights)
    if readable or any(p.name == "model.safetensors.index.json" for p in files):
        return Thing(Kind.MODEL, path, "a model directory")
    return Thing(Kind.WEIGHTLESS, path, "a model directory without weights that are read here")


def _readable_record(path: Path) -> bool:
    try:
        read_record(path)
    except So8tqcError:
        return False
    return True


def _folder(path: Path, files: list[Path], weights: list[Path]) -> Thing:
    """A folder that no file of it explains."""
    ggufs = [p for p in files if p.suffix.lower() == ".gguf"]
    if len(ggufs) == 1 or (ggufs and all(part_name(p) is not None for p in ggufs)):
        return recognise(ggufs[0])
    if ggufs:
        names = ", ".join(p.name for p in ggufs[:5])
        return Thing(Kind.GGUF_FOLDER, path, f"a folder of {len(ggufs)} GGUF files ({names})")
    if weights:
        return Thing(Kind.GATES, path, "a folder of weights without a model's config.json")
    return _folder_without_weights(path, files)


def _folder_without_weights(path: Path, files: list[Path]) -> Thing:
    if any(p.name in _TOKENIZER_FILES for p in files):
        return Thing(Kind.TOKENIZER, path, "a tokenizer without a model")
    pictures = [p for p in files if p.suffix.lower() in _PICTURES]
    if len(pictures) * 2 > len(files):
        return Thing(Kind.PICTURES, path, f"a folder of {counted(len(pictures), 'picture')}")
    texts = [p for p in files if p.suffix.lower() in _TEXTS]
    if len(texts) * 2 > len(files):
        return Thing(Kind.TEXT, path, f"a folder of {counted(len(texts), 'text file')}")
    what = f"a folder of {counted(len(files), 'file')}, none of which is a model's"
    return Thing(Kind.UNKNOWN, path, what)
