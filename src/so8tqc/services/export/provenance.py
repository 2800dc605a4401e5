"""What a GGUF file says about the bake it comes from: ``so8t.*`` keys, out of ``so8tqc.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from so8tqc.checkpoints.provenance import Provenance
from so8tqc.gguf.rewrite import Value

BAKED_KEY = "so8t.baked"


def provenance_keys(provenance: Provenance) -> dict[str, Value]:
    """The keys of a baked model; the base's fingerprint is absent where the bake has none."""
    keys: dict[str, Value] = {
        BAKED_KEY: True,
        "so8t.rotations.fingerprint": provenance.rotations_fingerprint,
        "so8t.version": provenance.versions.get("so8tqc", ""),
    }
    for name in ("convention", "parametrization", "site"):
        if (value := getattr(provenance, name)) is not None:
            keys[f"so8t.{name}"] = str(value)
    if provenance.adapters:
        keys["so8t.adapters"] = ", ".join(adapter.kind for adapter in provenance.adapters)
    if provenance.base_fingerprint is not None:
        keys["so8t.base.fingerprint"] = provenance.base_fingerprint
    return keys


def says_baked(fields: Mapping[str, Any]) -> bool:
    """Whether a GGUF file's key-values say that it was baked."""
    return fields.get(BAKED_KEY) is True
