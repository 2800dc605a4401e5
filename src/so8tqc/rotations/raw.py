"""What a rotation file says, before parametrization and validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.rotation_set import FloatArray, Target


@dataclass(frozen=True)
class RawRotations:
    """Contents of a rotation source; None where it does not say.

    Attributes:
        theta: target → [N, b, b] float64, parameters (or blocks for ``matrix``).
        parametrization, convention, site: as declared by the source.
        shared: each target has one block that is repeated over all its features.
        metadata: what else it declares.
        notices: what the reader wants the user to know.
    """

    theta: Mapping[Target, FloatArray]
    parametrization: Parametrization | None = None
    convention: Convention | None = None
    site: Site | None = None
    shared: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
