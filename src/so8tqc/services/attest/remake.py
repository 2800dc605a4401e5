"""Links of a statement, made again: each kind of step from its inputs and recorded parameters.

What is written goes into a scratch directory and is compared elsewhere. A step that measures
rather than derives (fitting a temperature) makes nothing again; writing a temperature into a file
does.

Two names would otherwise leak into bytes. The converter writes the model directory's name into the
GGUF, so the directory is made again under that name; ``so8tqc.json`` says where base, rotations and
adapters were and which versions baked, so the statement carries these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from so8tqc.checkpoints.provenance import (
    BakedAdapter,
    Provenance,
    read_provenance,
    write_provenance,
)
from so8tqc.config import BakeConfig, CalibrateConfig, ExportConfig
from so8tqc.errors import ModelError
from so8tqc.gguf.mmproj import PREFIX as MMPROJ
from so8tqc.gguf.mmproj import mmproj_beside
from so8tqc.progress import Progress
from so8tqc.record_kinds.quantize import Build
from so8tqc.services.attest.requantize import make_again
from so8tqc.services.attest.statement import BASE, ROTATIONS, WEIGHING, Link, adapter_names
from so8tqc.services.bake import bake
from so8tqc.services.calibrate.apply import write_applied
from so8tqc.services.export.service import write_gguf

TEMPERATURE_KEYS = ("apply", "sampling_temp")

Inputs = Mapping[str, Path]
"""Name of a link's input → where it is."""

Made = dict[str, Path]
"""Name of a link's output → the one made again."""


def remake(link: Link, inputs: Inputs, scratch: Path, progress: Progress) -> Made:
    """Make a link's outputs again in an empty directory; those that cannot be are left out.

    Args:
        link: what to make.
        inputs: of every input of the link.
        scratch: where to.
        progress: told about the work.

    Raises:
        So8tqcError: as the service of that step.
    """
    return _MAKERS[link.kind](link, inputs, scratch, progress)


def _bake(link: Link, inputs: Inputs, scratch: Path, progress: Progress) -> Made:
    folder = str(link.parameters["model"])
    model = scratch / Path(folder).name
    options = {**_mapping(link.parameters["options"]), "verify": True}
    places = {
        "base": inputs[BASE],
        "rotations": inputs.get(ROTATIONS),
        "adapters": [inputs[name] for name in adapter_names(link)],
        "out": model,
    }
    bake(BakeConfig.model_validate({**options, **places}), progress)
    written = read_provenance(model)
    if written is None:
        raise ModelError("the bake left no provenance", where=str(model))
    said = _mapping(link.parameters["said"])
    if "adapters" in said:
        said["adapters"] = _at_places(written.adapters, said["adapters"])
    whole = Provenance.model_validate({**written.model_dump(), **said})
    write_provenance(model, whole)
    files = (path for path in model.rglob("*") if path.is_file())
    return {f"{folder}/{path.relative_to(model).as_posix()}": path for path in files}


def _at_places(written: Sequence[BakedAdapter], places: object) -> list[BakedAdapter]:
    """The adapters as baked again, with the places that the statement says."""
    if not isinstance(places, list) or len(places) != len(written):
        raise ModelError("the statement says the places of other adapters than it names")
    pairs = zip(written, places, strict=True)
    return [adapter.model_copy(update={"path": str(place)}) for adapter, place in pairs]


def _export(link: Link, inputs: Inputs, scratch: Path, progress: Progress) -> Made:
    folder = str(link.parameters["model"])
    model = scratch / Path(folder).name  # the converter puts its name into the file
    for name, path in inputs.items():
        place = model / Path(name).relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path.resolve())
    text = next(o for o in link.outputs if not Path(o.name).name.startswith(MMPROJ))
    made = scratch / Path(text.name).name
    options = {**_mapping(link.parameters["options"]), "model": model, "out": made}
    write_gguf(ExportConfig.model_validate(options), progress)
    beside = mmproj_beside(made)
    seen = str(Path(text.name).with_name(beside.name))
    return {text.name: made} | ({seen: beside} if beside.is_file() else {})


def _quantize(link: Link, inputs: Inputs, scratch: Path, progress: Progress) -> Made:
    (output,) = link.outputs
    options = _mapping(link.parameters["options"])
    places = {name if name in WEIGHING else "gguf": path for name, path in inputs.items()}
    return {output.name: make_again(options["types"][0], options, places, scratch, progress)}


def recorded_build(link: Link) -> Build:
    """The build of libllama that quantized."""
    return Build.model_validate(link.parameters["build"])


def _calibrate(link: Link, inputs: Inputs, scratch: Path, progress: Progress) -> Made:
    applied = [output for output in link.outputs if output.name.endswith(".gguf")]
    if not applied:
        return {}
    (gguf,) = inputs.values()
    options = {key: link.parameters[key] for key in TEMPERATURE_KEYS}
    config = CalibrateConfig.model_validate(
        {**options, "gguf": gguf, "tokenizer": gguf.parent, "out": scratch}
    )
    temperature = float(str(link.parameters["temperature"]))
    return {applied[0].name: write_applied(config, temperature, progress)}


_MAKERS: Mapping[str, Callable[[Link, Inputs, Path, Progress], Made]] = {
    "bake": _bake,
    "export": _export,
    "quantize": _quantize,
    "calibrate": _calibrate,
}


def _mapping(value: JsonValue) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ModelError("the statement's parameters are not those of this version")
    return dict(value)
