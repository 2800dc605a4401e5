"""Bake SO(8) rotation gates into transformer weights, and prove every step."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from so8tqc.adaptive import AdaptiveTemperature
    from so8tqc.monitor import OscillationMonitor

    __version__: str

__all__ = ["AdaptiveTemperature", "OscillationMonitor", "__version__"]

_HOMES = {
    "AdaptiveTemperature": "so8tqc.adaptive",
    "OscillationMonitor": "so8tqc.monitor",
}
"""Where names live whose modules import torch: looked up on first use, so that import is light."""


def __getattr__(name: str) -> object:
    if name == "__version__":  # the metadata of packages take longer than the rest of this import
        return import_module("importlib.metadata").version(__name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
