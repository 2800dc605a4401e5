"""Whether an adapter was trained on this base: what it says of its own, compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from so8tqc.adapters.files import AdapterFiles
from so8tqc.checkpoints.safetensors_index import Checkpoint
from so8tqc.disk.foreign import read_whole
from so8tqc.errors import RotationError

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
    types = {str(checkpoint.config.get("model_type", "")), checkpoint.model_type}
    name = family[1].split(".")[0] if len(family) == 2 else ""
    if name and any(types) and name not in types | {t.removesuffix("_text") for t in types}:
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
