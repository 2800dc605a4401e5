"""How a rotation file is to be read."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from so8tqc.options import Options
from so8tqc.rotations.enums import Convention, Parametrization, Site


class RotationOptions(Options):
    """How a rotation file is to be read; None means what the file says, else the default."""

    convention: Convention | None = Field(
        None, description="column: the gate computes R·x (default); row: x_row·R."
    )
    parametrization: Parametrization | None = Field(
        None, description="How theta becomes R; default exp."
    )
    site: Site | None = Field(None, description="Gate before (input, default) or after (output).")
    layers: str | None = Field(
        None,
        description="Layers that carry a gate, e.g. 0-11,13; default all layers of the model.",
        pattern=r"^\d+(-\d+)?(,\d+(-\d+)?)*$",
    )
    orthogonalize: Literal["as-trained", "polar"] = Field(
        "as-trained", description="Bake the trained matrix, or the rotation nearest to it."
    )
