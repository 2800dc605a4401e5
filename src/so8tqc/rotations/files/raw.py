"""What a rotation source says, before parametrization and validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.rotation_set import FloatArray, Target

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RawRotations:
    """Contents of a rotation source; None where neither it nor the names of its tensors say.

    Attributes:
        theta: target → [N, b, b] float64, parameters (or blocks for ``matrix``).
        parametrization, convention, site: as declared by the source, or recognised.
        shared: each target has one block that is repeated over all its features.
        metadata: what else it declares.
        notices: what the reader wants the user to know.
        recognised: by which names of tensors facts were recognised, "" if none were.
        keys: target → the key its theta was read from.
        dtype: torch's name of the dtype that theta is stored in, "" if nobody needs to know.
        strength: s of a target whose gate computes x + s·R·x; a target without computes R·x.
        weights: name without wrapper levels → tensor, everything that lies beside the gates.
        files: name → name of the file that a weight was read from.
        settings: what the source says of an adapter beside the gates: ``adapter_config.json``, or
            entries of a checkpoint that are called as its are.
    """

    theta: Mapping[Target, FloatArray]
    parametrization: Parametrization | None = None
    convention: Convention | None = None
    site: Site | None = None
    shared: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    recognised: str = ""
    keys: Mapping[Target, str] = field(default_factory=dict)
    dtype: str = ""
    strength: Mapping[Target, float] = field(default_factory=dict)
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
