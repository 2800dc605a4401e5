"""What the source of transformers' model class says, read without importing it.

Importing a model class takes seconds, in which nothing else of a bake can begin. Whether it could
hold a ``Conv1D`` at all, whose weights are stored [in, out], a look at its text tells: a class can
make only what its module names, or what the modules name that it imports from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from so8tqc.checkpoints.safetensors_index import Checkpoint

_CONV1D = re.compile(r"\bConv1D\b")
_SIBLING = re.compile(r"^\s*from \.\.(\w+)(?:\.(\w+))? import", re.MULTILINE)
_STAR = re.compile(r"^\s*from \S+ import \*", re.MULTILINE)
_AUTO = re.compile(r"^\s*from \S*\bauto(?:\.\w+)* import", re.MULTILINE)
_NAME = re.compile(r"[a-z0-9_]+")


def rules_out_conv1d(checkpoint: Checkpoint) -> bool:
    """Whether the classes of a checkpoint are transformers' own and name no ``Conv1D``.

    True only where each of these holds; False is no answer (ask :func:`~so8tqc.checkpoints.
    skeleton.skeleton`):

    * transformers has a module of the config's ``model_type``, and the class that the config names,
      if it names one, is defined there;
    * where that module makes towers by an Auto class, each nested config has a ``model_type`` with
      a module of its own;
    * none of these modules, nor any other model's that they import from, names ``Conv1D``.
    """
    config = checkpoint.config
    source = _source(str(config.get("model_type")), None)
    if source is None or not all(_defines(source, name) for name in _classes(config)):
        return False
    sources = [source]
    if _AUTO.search(source):
        for model_type in _nested_types(config):
            nested = _source(str(model_type), None)
            if nested is None:
                return False
            sources.append(nested)
    return not any(_names_conv1d(source) for source in sources)


def _classes(config: Mapping[str, object]) -> list[object]:
    named = config.get("architectures") or []
    return named if isinstance(named, list) else [named]


def _defines(source: str, name: object) -> bool:
    return re.search(rf"^class {re.escape(str(name))}\(", source, re.MULTILINE) is not None


def _nested_types(config: Mapping[str, object]) -> Iterator[object]:
    """``model_type`` of each config that is nested in a config; None for one that has none."""
    for key, nested in config.items():
        if isinstance(nested, dict) and key.endswith("_config") and key not in _NO_MODELS:
            yield nested.get("model_type")
            yield from _nested_types(nested)


_NO_MODELS = {"quantization_config", "generation_config", "compression_config"}


def _names_conv1d(source: str, seen: frozenset[tuple[str, str]] = frozenset()) -> bool:
    """Whether a module, or a model's that it imports from, names it; an unknown one may."""
    if _CONV1D.search(source) or _STAR.search(source):
        return True
    for match in _SIBLING.finditer(source):
        model, module = match[1], match[2] or ""
        if (model, module) in seen or module.startswith("configuration_") or model == "auto":
            continue
        imported = _source(model, module)
        if imported is None or _names_conv1d(imported, seen | {(model, module)}):
            return True
    return False


@cache
def _source(model: str, module: str | None) -> str | None:
    """Text of a module of transformers' models; None where there is no such file.

    Args:
        model: a model type, or the package of one.
        module: in it; None: that of its classes.
    """
    package = model.replace("-", "_")
    found = find_spec("transformers")
    if not _NAME.fullmatch(package) or found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0]) / "models" / package
    path = folder / f"{module or f'modeling_{package}'}.py"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        return None
