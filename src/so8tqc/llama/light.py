"""libllama's bindings for a process that does nothing else; imports nothing but these."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_PACKAGE = "llama_cpp"


def light_bindings() -> Any:
    """The binding module without its package's ``__init__``, which imports numpy, jinja2 and more.

    The parent has loaded it in the ordinary way before it gives out work, so here it is there.
    """
    spec = find_spec(_PACKAGE)
    if spec is not None and _PACKAGE not in sys.modules:
        package = ModuleType(_PACKAGE)
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules[_PACKAGE] = package
    return importlib.import_module(f"{_PACKAGE}.llama_cpp")
