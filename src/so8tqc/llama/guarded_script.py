"""Runs a llama.cpp script with transformers' remote code switched off, whatever the script asks.

``python -P -m so8tqc.llama.guarded_script SCRIPT ARGUMENT…``

Some of the converter's tokenizer paths pass ``trust_remote_code=True``; transformers would then
run Python files of the model directory.

``SO8TQC_CONVERSION_TRACE`` names a file for the history of every tensor (``conversion_trace``);
with ``SO8TQC_TRACE_ALONE`` the script ends when that is known, before a byte of the GGUF is
written. ``SO8TQC_CONFIG_KEYS`` is JSON of keys that the model's configuration shall say, too;
``SO8TQC_GENERATION`` is what is to be read in place of its ``generation_config.json``.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

TRACE = "SO8TQC_CONVERSION_TRACE"
TRACE_ALONE = "SO8TQC_TRACE_ALONE"
KEYS = "SO8TQC_CONFIG_KEYS"
GENERATION = "SO8TQC_GENERATION"
VISION = "--mmproj"
"""The converter's argument that asks for the vision tower's file."""


def _refuse(*_arguments: object, **_options: object) -> NoReturn:
    raise PermissionError(
        "the model brings Python code of its own (auto_map in its configuration), "
        "which is never run; save it with a tokenizer that transformers knows"
    )


def _give(keys: dict[str, Any]) -> None:
    """Have every configuration that the script reads say these, too, of its text model.

    In the file they would not last: transformers renames them when it reads them. Some types'
    configuration the script reads as JSON.
    """
    from transformers import AutoConfig

    reading, loading = AutoConfig.from_pretrained, json.load

    def say(values: dict[str, Any]) -> None:
        text = values.get("text_config")
        (text if isinstance(text, dict) else values).update(keys)

    def load(stream: Any, **options: Any) -> Any:
        content = loading(stream, **options)
        name = getattr(stream, "name", "")
        if isinstance(name, str) and Path(name).name == "config.json" and isinstance(content, dict):
            say(content)
        return content

    vars(json)["load"] = load

    def from_pretrained(*args: Any, **options: Any) -> Any:
        config = reading(*args, **options)
        saying = config.to_dict

        def to_dict() -> dict[str, Any]:
            values: dict[str, Any] = saying()
            values.pop("to_dict", None)  # this function, which is an attribute by now
            say(values)
            return values

        vars(config)["to_dict"] = to_dict
        return config

    AutoConfig.from_pretrained = staticmethod(from_pretrained)


def _sample(values: dict[str, Any]) -> None:
    """Have gguf-py read these sampling defaults in place of the model's own, where it reads any."""
    with suppress(ImportError):
        from gguf.metadata import Metadata

        if hasattr(Metadata, "load_generation_config"):
            Metadata.load_generation_config = staticmethod(lambda _model=None: values)


def _trace(path: Path) -> None:
    """Have the conversion traced to a file, where the script is one that uses gguf-py."""
    try:
        import gguf

        from so8tqc.llama.conversion_trace import Tracer

        tracer = Tracer()
        tracer.install()
    except (ImportError, AttributeError):  # another llama.cpp's gguf-py: there will be no trace
        return
    writing = gguf.GGUFWriter.write_header_to_file

    def write_header(writer: gguf.GGUFWriter, *args: object, **options: object) -> None:
        if os.environ.get(TRACE_ALONE):
            tracer.note_keys(writer)
        tracer.write(path)
        if os.environ.get(TRACE_ALONE):
            raise SystemExit(0)
        writing(writer, *args, **options)

    gguf.GGUFWriter.write_header_to_file = write_header


_LAYERS_OF_PROJECTORS = 16
_RESPELLED = {"vision_tower.": "vision_tower.vision_model."}
"""Names of vision towers as transformers 5 saves them → as the published checkpoints have them."""


def _know_more_names() -> None:
    """Have the name map of vision towers know the spellings of transformers 5, and layers of a
    projector that are numbered beyond those of a small tower."""
    import gguf

    names = gguf.TensorNameMap
    building, finding = names.__init__, names.get_type_and_name

    def build(table: Any, arch: Any, n_blocks: int) -> None:
        building(table, arch, max(n_blocks, _LAYERS_OF_PROJECTORS))

    def find(table: Any, key: str, try_suffixes: Any = ()) -> Any:
        found = finding(table, key, try_suffixes)
        for saved, published in _RESPELLED.items():
            if found is None and key.startswith(saved):
                found = finding(table, published + key.removeprefix(saved), try_suffixes)
        return found

    names.__init__ = build
    names.get_type_and_name = find


def main(script: Path, arguments: list[str]) -> None:
    """Run ``script`` as ``python SCRIPT ARGUMENT…`` would."""
    # before the auto classes are imported: they take the function by its name
    from transformers import dynamic_module_utils

    dynamic_module_utils.get_class_from_dynamic_module = _refuse
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    if keys := os.environ.get(KEYS):
        _give(json.loads(keys))
    if (generation := os.environ.get(GENERATION)) is not None:
        _sample(json.loads(generation))
    if trace := os.environ.get(TRACE):
        _trace(Path(trace))
    if VISION in arguments:
        _know_more_names()
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
