"""Whether an adapter was trained on this base: what it says of its own, compared."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from so8tqc.adapters.files import AdapterFiles
from so8tqc.checkpoints.safetensors_index import Checkpoint
from so8tqc.disk.digests import hub_source
from so8tqc.disk.foreign import read_whole
from so8tqc.errors import RotationError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

_COMPARED = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "vocab_size",
    "num_attention_heads",
)


def require_same_base(files: AdapterFiles, checkpoint: Checkpoint) -> None:
    """Compare what the adapter says of its own base with this one.

    Raises:
        RotationError: it names another architecture, or a directory with other sizes.
    """
    where = str(files.directory)
    mapping = files.config.get("auto_mapping")
    library = mapping.get("parent_library", "") if isinstance(mapping, dict) else ""
    family = str(library).split("transformers.models.")
    types = {str(checkpoint.config.get("model_type", "")), checkpoint.model_type} - {""}
    name = family[1].split(".")[0] if len(family) == 2 else ""
    known = types | {t.removesuffix("_text") for t in types}
    if name and types and name not in known and name not in _modules(types):
        raise RotationError(
            f"the adapter was trained on a {name} model, the base is {', '.join(sorted(types))}",
            where=where,
            remedy="Give the base that the adapter was trained on.",
        )
    named = files.config.get("base_model_name_or_path")
    if isinstance(named, str) and named and (Path(named) / "config.json").is_file():
        theirs = _sizes(_read_config(Path(named)))
        ours = _sizes(checkpoint.config)
        different = [k for k in _COMPARED if theirs.get(k) != ours.get(k)]
        if different:
            listed = ", ".join(f"{k} {theirs.get(k)} there, {ours.get(k)} here" for k in different)
            raise RotationError(
                f"the adapter names {named} as its base, which is another model: {listed}",
                where=where,
                remedy="Give the base that the adapter was trained on.",
            )


def other_name(files: AdapterFiles, checkpoint: Checkpoint) -> str | None:
    """A notice where adapter and base give different names of a hub, which may be one model."""
    named = files.config.get("base_model_name_or_path")
    cached = hub_source(checkpoint.directory)
    ours = cached.split("@")[0] if cached else checkpoint.config.get("_name_or_path")
    if not (_is_hub_name(named) and _is_hub_name(ours)) or named.lower() == ours.lower():
        return None
    return (
        f"{files.directory.name} says that it was trained on {named}, this base that it is {ours}: "
        "a merge is what was trained only if their weights are the same (a quantized base's are "
        "others, see --trained-on)."
    )


def _is_hub_name(name: object) -> TypeGuard[str]:
    return (
        isinstance(name, str) and _HUB_NAME.fullmatch(name) is not None and not Path(name).exists()
    )


def _modules(types: set[str]) -> set[str]:
    """transformers' modules that hold these model types: not always of the same name."""
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    return {str(model_type_to_module_name(one)) for one in types}


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_whole(directory / "config.json", RotationError).decode("utf-8"))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    return {key: inner.get(key, config.get(key)) for key in _COMPARED}
