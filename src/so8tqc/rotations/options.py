"""How a rotation file is to be read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from so8tqc.options import Options
from so8tqc.rotations.enums import Convention, Parametrization, Site


class RotationOptions(Options):
    """How a rotation file is to be read. None: as the file states, or as the names of its tensors
    leave no choice; what neither says must be stated here."""

    convention: Convention | None = Field(
        None, description="column: the gate computes R·x; row: x_row·R. None: as the file states."
    )
    parametrization: Parametrization | None = Field(
        None, description="How theta becomes R. None: as the file states."
    )
    site: Site | None = Field(
        None,
        description="Gate before the projection (input), after it (output), or in front of the "
        "output head (head). None: as the file states.",
    )
    key: str | None = Field(
        None,
        description="Names of the gates' tensors where nobody knows them, {layer} standing for "
        "the number of the layer; or a regular expression with it as its first group.",
    )
    lora_alpha: float | None = Field(
        None,
        description="α of LoRA branches beside the gates (s = α/r), where no adapter_config.json "
        "states it.",
    )
    layers: str | None = Field(
        None,
        description="Layers that carry a gate, e.g. 0-11,13; default all layers of the model.",
        pattern=r"^\d+(-\d+)?(,\d+(-\d+)?)*$",
    )
    adapters: tuple[Path, ...] = Field(
        (),
        description="PEFT adapters beside the rotations, in the order in which they apply; gates "
        "are in front of base and adapters.",
    )
    orthogonalize: Literal["as-trained", "polar"] = Field(
        "as-trained", description="Bake the trained matrix, or the rotation nearest to it."
    )
