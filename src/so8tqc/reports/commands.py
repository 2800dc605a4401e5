"""Command lines that make a stage's work again, filled in from what its record was given."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue

from so8tqc.records import Record
from so8tqc.rotations.options import RotationOptions

_AGAIN = "-again"
_ADAPTERS = "adapters"

_PLACEHOLDER = r"(?:[A-Z][A-Z0-9_]*(?:\.[a-z]+)?(?![A-Za-z])|…)"
_WORD = rf"(?:{_PLACEHOLDER}|--[a-z][a-z0-9-]*(?:\ [a-z0-9_]+(?=[ .。(（]|$))?)"
_TEMPLATE = re.compile(
    rf"""
    \s* [(（] [^()（）]* --[a-z][a-z0-9-]*\ {_PLACEHOLDER} [^()（）]* [)）]  # (--data FILE)
    | \s* [:：] \s* (?:so8tqc(?:\ [a-z-]+)+\ )? (?=[^.。(（]*{_PLACEHOLDER})
        {_WORD} (?:\ {_WORD})*  # : so8tqc bake BASE ROTATIONS --out DIR
    """,
    re.VERBOSE,
)


def command(*parts: object) -> str:
    """One shell line; whatever needs quoting is quoted."""
    return shlex.join(["so8tqc", *map(str, parts)])


def without_placeholders(text: str) -> str:
    """A remedy without the command lines in it that a user would have to fill in."""
    return _TEMPLATE.sub("", text)


def named(text: str) -> set[str]:
    """The commands that a text or a command line names: ``bake``, ``qc`` …"""
    return set(re.findall(r"so8tqc ([a-z-]+)", text))


def bake_again(records: Mapping[str, Record], *extra: str) -> str:
    """Bake what the reference is, beside the directory that was found wanting; "" if unknown.

    The rotations are read as the reference of ``qc`` reads them, whatever the bake was told.
    """
    qc, bake = records.get("qc"), records.get("bake")
    config = (qc or bake or next(iter(records.values()))).config
    base = config.get("base") or config.get("reference")
    rotations = config.get("rotations")
    if not base or not rotations:
        return ""
    out = _baked(config)
    told = config.get("rotation_options") if "candidates" in config else config
    return command("bake", base, rotations, "--out", f"{out}{_AGAIN}", *_flags(told), *extra)


def export_again(record: Record) -> str:
    """Convert the same model to the same type, into another file."""
    config = record.config
    if not {"model", "out", "type"} <= config.keys():
        return ""
    out = Path(str(config["out"]))
    again = out.with_name(f"{out.stem}{_AGAIN}{out.suffix}")
    return command("export", config["model"], "--out", again, "--type", config["type"])


def quantize_again(record: Record) -> str:
    """Quantize the same file to the same types, into another folder."""
    config = record.config
    if not {"gguf", "out", "types"} <= config.keys():
        return ""
    types = [part for kind in _listed(config["types"]) for part in ("--type", kind)]
    return command("quantize", config["gguf"], *types, "--out", f"{config['out']}{_AGAIN}")


def calibrate_again(record: Record, *extra: str) -> str:
    """Fit the temperature of the same file again, into another folder."""
    config = record.config
    if not {"gguf", "tokenizer", "out"} <= config.keys():
        return ""
    out = f"{config['out']}{_AGAIN}"
    tokenizer = config["tokenizer"]
    return command("calibrate", config["gguf"], "--tokenizer", tokenizer, *extra, "--out", out)


def locate(record: Record, subject: str) -> str:
    """Where a candidate of a ``qc`` parts from its reference; "" where that is no directory."""
    config = record.config
    candidates = [str(path) for path in _listed(config.get("candidates"))]
    mine = [path for path in candidates if subject in (path, Path(path).name)]
    reference = str(config.get("base") or config.get("reference") or "")
    if not mine or not reference or Path(reference).suffix in (".gguf", ".safetensors"):
        return ""
    rotations = config.get("rotations")
    gates = ["--rotations", rotations] if rotations else []
    told = _flags(config.get("rotation_options"))
    out = f"{config.get('out', 'qc')}-located"
    return command("locate", reference, mine[0], *gates, *told, "--out", out)


def _listed(value: JsonValue) -> list[JsonValue]:
    """A list of the config; nothing where it is none."""
    return value if isinstance(value, list) else []


def _baked(config: Mapping[str, JsonValue]) -> str:
    """The directory that was baked: a bake's own, or the first candidate that is no GGUF."""
    candidates = [str(path) for path in _listed(config.get("candidates"))]
    folders = [path for path in candidates if not path.lower().endswith(".gguf")]
    return str(config.get("out")) if not candidates else (folders or ["baked"])[0].rstrip("/")


def _flags(options: JsonValue) -> list[str]:
    """How the rotations are to be read, as far as it was stated, and the adapters beside them."""
    stated = options if isinstance(options, dict) else {}
    flags = [
        part
        for name, field in RotationOptions.model_fields.items()
        if name != _ADAPTERS and stated.get(name) not in (None, field.default)
        for part in (f"--{name.replace('_', '-')}", str(stated[name]))
    ]
    adapters = [str(path) for path in _listed(stated.get(_ADAPTERS))]
    return [*flags, *(part for path in adapters for part in ("--adapter", path))]
