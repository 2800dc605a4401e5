"""Bake SO(8) rotation gates into transformer weights, and prove every step."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from so8tqc.adaptive import AdaptiveTemperature
    from so8tqc.api import (
        audit,
        bake,
        calibrate,
        capture,
        compare,
        export,
        load_record,
        locate,
        longtext,
        qc,
        quantize,
        read_rotations,
    )
    from so8tqc.errors import So8tqcError
    from so8tqc.monitor import OscillationMonitor
    from so8tqc.records import Record

    __version__: str

__all__ = [
    "AdaptiveTemperature",
    "OscillationMonitor",
    "Record",
    "So8tqcError",
    "__version__",
    "audit",
    "bake",
    "calibrate",
    "capture",
    "compare",
    "export",
    "identify",
    "load_record",
    "locate",
    "longtext",
    "qc",
    "quantize",
    "read_rotations",
]

_HOMES = {
    "AdaptiveTemperature": "so8tqc.adaptive",
    "OscillationMonitor": "so8tqc.monitor",
    "Record": "so8tqc.records",
    "So8tqcError": "so8tqc.errors",
}
"""Where names live, if not in ``so8tqc.api``: looked up on first use, so that import is light."""


def __getattr__(name: str) -> object:
    if name == "__version__":  # the metadata of packages take longer than the rest of this import
        return import_module("importlib.metadata").version(__name__)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "so8tqc.api")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
