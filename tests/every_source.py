"""All that qc makes of one model."""

from __future__ import annotations

from pathlib import Path

from so8tqc.rotations.read import read_rotations
from so8tqc.sources.folded import FoldedSource
from so8tqc.sources.gated import GatedSource
from so8tqc.sources.hf import HFModel, HFSource
from so8tqc.sources.protocol import LogitSource


def every_source(model: HFModel, gates: Path) -> dict[str, LogitSource]:
    rotations = read_rotations(gates)
    return {
        "plain": HFSource(model, "plain"),
        "gated": GatedSource(model, rotations, "gated"),
        "folded": FoldedSource(model, rotations, "folded", None),
        "rounded": FoldedSource(model, rotations, "rounded", "bfloat16"),
        "plain again": HFSource(model, "plain again"),  # nothing that was replaced stays
    }
