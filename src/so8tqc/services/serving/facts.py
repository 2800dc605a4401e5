"""What is known of a GGUF that is to be served: temperature, chat template, where answers end."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from so8tqc.disk.digests import sha256_file
from so8tqc.disk.foreign import read_whole
from so8tqc.disk.temperature_file import TEMPERATURE_FILE, read_temperature, require_fitted_on
from so8tqc.errors import DataError, InputError, ModelError
from so8tqc.gguf.file import GGUFFile, open_gguf
from so8tqc.gguf.norm import NORM_TEMPERATURE
from so8tqc.gguf.rewrite import CALIBRATION_TEMPERATURE, SAMPLING_TEMPERATURE
from so8tqc.gguf.vocabulary import token_texts
from so8tqc.record_files import read_record, record_beside

GENERATION_FILE = "generation_config.json"
_TEMPLATE = "tokenizer.chat_template"
_ID_KEY = "tokenizer.ggml.{}_token_id"
_ENDS = ("eos", "eot", "eom")
_LONGEST_CHAIN = 8
"""Records that are followed from a file to the directory it was exported from."""


@dataclass(frozen=True)
class Token:
    """A token of the vocabulary."""

    id: int
    text: str


@dataclass(frozen=True)
class Temperature:
    """A temperature, None if there is none to be told, and where it came from (a sentence)."""

    value: float | None
    origin: str


@dataclass(frozen=True)
class Serving:
    """What a runtime is to be told.

    Attributes:
        gguf: the file.
        name: for people, its name without the ending.
        temperature: to sample at.
        sampling: the model's other sampling defaults, by GGUF's names (``top_k`` …).
        template: jinja chat template, "" if the file has none.
        bos: the token that every text begins with, None if there is none.
        adds_bos: whether runtimes put it in front by themselves.
        stops: tokens that end an answer.
        declared: stops that the file itself names, by GGUF's words: ``eos``, ``eot``, ``eom``.
        notices: what could not be found.
    """

    gguf: Path
    name: str
    temperature: Temperature
    sampling: Mapping[str, float]
    template: str
    bos: Token | None
    adds_bos: bool
    stops: tuple[Token, ...]
    declared: Mapping[str, int]
    notices: tuple[str, ...]


def facts_of(path: Path, model: Path | None, temperature: Path | None) -> Serving:
    """Gather them.

    Args:
        path: the GGUF.
        model: directory that it was exported from; None: as the records beside it say.
        temperature: ``temperature_config.json``; None: looked for.

    Raises:
        ModelError: no readable GGUF, or one without a vocabulary.
        DataError: a temperature file of another model, or none.
        InputError: ``model`` is no directory, or its generation config cannot be read.
    """
    gguf = open_gguf(path)
    fields = gguf.fields
    declared = {name: int(fields[key]) for name in _ENDS if (key := _ID_KEY.format(name)) in fields}
    directory = model or _exported_from(path)
    notices: list[str] = []
    ids = dict.fromkeys((*declared.values(), *_generation_ends(directory, notices)))
    bos = fields.get(_ID_KEY.format("bos"))
    texts = token_texts(path, {*ids, *(() if bos is None else (int(bos),))})
    template = str(fields.get(_TEMPLATE) or "")
    if not template:
        notices.append("The file has no chat template: it is served as one that goes on with text.")
    return Serving(
        gguf=path.resolve(),
        name=path.stem,
        temperature=_temperature(gguf, temperature),
        sampling={
            name: _exact(fields[key])
            for name in ("top_k", "top_p", "min_p")
            if (key := f"general.sampling.{name}") in fields
        },
        template=template,
        bos=None if bos is None else Token(int(bos), texts[int(bos)]),
        adds_bos=bool(fields.get("tokenizer.ggml.add_bos_token", False)),
        stops=tuple(Token(number, texts[number]) for number in ids),
        declared=declared,
        notices=tuple(notices),
    )


def _temperature(gguf: GGUFFile, given: Path | None) -> Temperature:
    """The given file's; else what the GGUF declares; else that of a file fitted on it nearby."""
    fields = gguf.fields
    if given is not None:
        config = read_temperature(given)
        require_fitted_on(config, gguf.path, str(given))
        return _fitted(config, given)
    if (folded := fields.get(NORM_TEMPERATURE)) is not None:
        value = _exact(folded)
        return Temperature(
            1.0, f"T = {value:.4g} was fitted by so8tqc calibrate and is in the weights already."
        )
    if (stated := fields.get(CALIBRATION_TEMPERATURE)) is not None:
        origin = f"fitted by so8tqc calibrate, as the file declares ({CALIBRATION_TEMPERATURE})."
        return Temperature(_exact(stated), f"T = {float(stated):.4g}, {origin}")
    if (found := _fitted_nearby(gguf.path)) is not None:
        return found
    if (own := fields.get(SAMPLING_TEMPERATURE)) is not None:
        origin = f"the model's own sampling default ({SAMPLING_TEMPERATURE}); none was fitted."
        return Temperature(_exact(own), f"T = {float(own):.4g}, {origin}")
    return Temperature(
        None,
        "No temperature: none was fitted on this file, and it declares none. "
        "Fit one: so8tqc calibrate FILE.gguf --tokenizer MODEL --out DIR",
    )


def _exact(value: float) -> float:
    """The shortest decimal of a float32 key; a whole number as one."""
    return value if isinstance(value, int) else float(f"{float(value):.7g}")


def _fitted(config: Mapping[str, Any], path: Path) -> Temperature:
    value = config.get("temperature")
    if not isinstance(value, int | float) or not 0 < value < math.inf or value is True:
        raise DataError(f"its temperature is {value!r}", where=str(path))
    if not config.get("significant", False):
        why = "so8tqc calibrate found no gain on held-out text that could be told from chance"
        return Temperature(float(value), f"T = {value:.4g}: {why} ({path}).")
    return Temperature(float(value), f"T = {value:.4g}, fitted by so8tqc calibrate ({path}).")


def _fitted_nearby(gguf: Path) -> Temperature | None:
    """Of a temperature file beside it, or in a folder beside its own, that names its digest."""
    folder = gguf.resolve().parent
    places = [folder, *_folders(folder), *_folders(folder.parent)]
    digest = ""
    for place in dict.fromkeys(places):
        path = place / TEMPERATURE_FILE
        if not path.is_file():
            continue
        try:
            config = read_temperature(path)
        except DataError:  # nobody named it: what it is, is not our concern
            continue
        model = config.get("model")
        digest = digest or sha256_file(gguf)
        if isinstance(model, dict) and model.get("sha256") == digest:
            return _fitted(config, path)
    return None


def _folders(place: Path) -> Iterator[Path]:
    try:
        yield from sorted(child for child in place.iterdir() if child.is_dir())
    except OSError:
        return


def _exported_from(gguf: Path) -> Path | None:
    """The directory that a GGUF came from, by the records beside it; None where these end."""
    path = gguf
    for _ in range(_LONGEST_CHAIN):
        source = _source(path)
        if source is None:
            return None
        if source.is_dir():
            return source
        path = source
    return None


def _source(path: Path) -> Path | None:
    """What a file was made from: a model directory, or another GGUF."""
    for beside in (record_beside(path), path.parent / "record.json"):
        if not beside.is_file():
            continue
        try:
            record = read_record(beside)
        except InputError:
            continue
        made = [Path(output.path).name for output in record.outputs.values()]
        given = record.inputs.get("model") or record.inputs.get("gguf")
        if path.name in made and given is not None:
            found = Path(given.path)
            return found if found.exists() else None
    return None


def _generation_ends(directory: Path | None, notices: list[str]) -> list[int]:
    """Token ids at which the model's generation config says that an answer ends."""
    if directory is None:
        notices.append(
            "Nothing says which model directory the file came from: stop tokens are those that "
            "the file itself names. --model DIR adds those of its generation_config.json."
        )
        return []
    if not directory.is_dir():
        raise InputError("no such model directory", where=str(directory))
    path = directory / GENERATION_FILE
    if not path.is_file():
        return []
    try:
        config = json.loads(read_whole(path, ModelError).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"not JSON: {error}", where=str(path)) from None
    found = config.get("eos_token_id") if isinstance(config, dict) else None
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in ids):
        raise ModelError(f"eos_token_id is {found!r}, no token ids", where=str(path))
    return ids
