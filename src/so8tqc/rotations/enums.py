"""The words in which a gate is described. Free of numpy, so that the CLI may import it."""

from __future__ import annotations

from enum import StrEnum


class Convention(StrEnum):
    """How a gate multiplies: ``column`` is R·x, ``row`` is x_row·R (that is Rᵀ·x)."""

    COLUMN = "column"
    ROW = "row"


class Site(StrEnum):
    """Where a gate sits: before its projection (``input``), after it (``output``), or between the
    last hidden state and the output head (``head``)."""

    INPUT = "input"
    OUTPUT = "output"
    HEAD = "head"

    @property
    def is_before(self) -> bool:
        """Whether the gate turns what its matrix is given, rather than what the matrix gives."""
        return self is not Site.OUTPUT


class Parametrization(StrEnum):
    """How theta becomes R."""

    EXP = "exp"
    CAYLEY = "cayley"
    LEGACY_TAYLOR = "legacy-taylor"
    SCALED_TAYLOR = "scaled-taylor"
    MATRIX = "matrix"

    @property
    def is_per_layer(self) -> bool:
        """Whether a block's R depends on the other blocks of its layer."""
        return self in (Parametrization.LEGACY_TAYLOR, Parametrization.SCALED_TAYLOR)


MEANINGS: dict[StrEnum, str] = {
    Parametrization.EXP: "R = expm(θ − θᵀ)",
    Parametrization.CAYLEY: "R = (I − A/2)⁻¹(I + A/2) with A = θ − θᵀ",
    Parametrization.LEGACY_TAYLOR: "ten Taylor terms of A/min(‖A‖, 1), a layer squared at most "
    "once: the first SO8T training code",
    Parametrization.SCALED_TAYLOR: "twelve Taylor terms of A scaled below 1 block by block, every "
    "block squared as often as the layer's largest one asks",
    Parametrization.MATRIX: "the tensor holds R itself",
    Convention.COLUMN: "the gate computes R·x",
    Convention.ROW: "the gate computes x_row·R, which is Rᵀ·x",
    Site.INPUT: "the gate sits before the projection",
    Site.OUTPUT: "the gate sits after the projection",
    Site.HEAD: "the gate sits between the last hidden state and the output head",
}
"""Each word in one line."""
