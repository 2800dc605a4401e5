"""The words in which a gate is described. Free of numpy, so that the CLI may import it."""

from __future__ import annotations

from enum import StrEnum


class Convention(StrEnum):
    """How a gate multiplies: ``column`` is R·x, ``row`` is x_row·R (that is Rᵀ·x)."""

    COLUMN = "column"
    ROW = "row"


class Site(StrEnum):
    """Where a gate sits: before the projection (``input``) or after it (``output``)."""

    INPUT = "input"
    OUTPUT = "output"


class Parametrization(StrEnum):
    """How theta becomes R."""

    EXP = "exp"
    CAYLEY = "cayley"
    LEGACY_TAYLOR = "legacy-taylor"
    MATRIX = "matrix"
