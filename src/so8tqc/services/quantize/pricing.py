"""What an error in a tensor costs, in nats: its curvature times how much its outputs matter.

With errors δ = W − Q of a matrix' rows and H = E[x xᵀ] of its inputs, its outputs move by
Σ δ H δᵀ, and the KL by ½ Ē[g²] times that (``sources.sensitivity``). An embedding's rows are its
outputs: with δ as large in the rows that texts use as in the others, they move by the mean of ‖δ‖².
An embedding that is the head as well pays for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from so8tqc.errors import ModelError, ShapeError
from so8tqc.gguf.file import GGUFFile
from so8tqc.quantizers.hessians import MomentsFile
from so8tqc.quantizers.solve import PASSES, Curvature, chosen_rows, damped, independent, solve
from so8tqc.services.quantize.recipe import EMBEDDING
from so8tqc.services.quantize.solver import UNJUDGED, decoded, row_costs, weights_of
from so8tqc.sources import sensitivity
from so8tqc.sources.moments import HEAD

Matrix = npt.NDArray[np.float64]

FEWEST_ROWS, MOST_ROWS, ROW_SHARE = 64, 1024, 32
"""Of a tensor's rows one in ``ROW_SHARE`` is solved for in each type: so many at least, at most."""


@dataclass(frozen=True)
class Price:
    """What errors in one tensor cost.

    Attributes:
        name: of the tensor.
        curvature: that its codes are solved with.
        hessian: [n, n] E[x xᵀ]; None: it is an embedding alone.
        by_output: nats for each unit of Σ δ H δᵀ.
        by_row: nats for each unit of the mean of ‖δ‖² over rows, where it embeds tokens.
    """

    name: str
    curvature: Curvature
    hessian: Matrix | None
    by_output: float
    by_row: float

    def nats(self, delta: Matrix, rows: int) -> float:
        """The KL that errors are predicted to cost.

        Args:
            delta: [r, n] W − Q of some of the rows.
            rows: how many the tensor has: the others are taken to be like these.
        """
        total = 0.0
        if self.hessian is not None:
            costs = sum(row_costs(delta, self.hessian).tolist())
            total += self.by_output * costs * rows / len(delta)
        if self.by_row:
            total += self.by_row * sum((delta * delta).sum(axis=1).tolist()) / len(delta)
        return total


def prices(
    source: GGUFFile, moments: MomentsFile, sensitive: Mapping[str, float], names: Mapping[str, str]
) -> Iterator[Price]:
    """The price of every tensor of which it is known, in the order of the layers.

    Args:
        source: the unquantized file.
        moments: of its matrices' inputs.
        sensitive: module → ½ Ē[g²] (``sources.sensitivity``).
        names: tensor of the model directory → tensor of the file.

    Raises:
        ModelError: second moments are singular.
    """
    of = _modules(source, moments, sensitive, names)
    embeds = sensitive[sensitivity.EMBEDDING]
    for group in moments.manifest.groups:
        own = [name for name in group.tensors if name in of]
        if not own:
            continue
        hessian = moments.moments(group).whole
        try:
            curvature = damped(hessian, UNJUDGED)
        except ShapeError as error:
            raise ModelError(error.what, where=own[0], remedy=error.remedy) from None
        for name in own:
            by_row = embeds if name == EMBEDDING else 0.0
            yield Price(name, curvature, hessian, sensitive[of[name]], by_row)
    if of.get(EMBEDDING) == sensitivity.EMBEDDING:
        alike = np.ones(source.tensors[EMBEDDING].shape[-1])
        yield Price(EMBEDDING, independent(alike), None, 0.0, embeds)


def priced_tensors(
    source: GGUFFile, moments: MomentsFile, sensitive: Mapping[str, float], names: Mapping[str, str]
) -> frozenset[str]:
    """The tensors that :func:`prices` knows the price of."""
    return frozenset(_modules(source, moments, sensitive, names))


def _modules(
    source: GGUFFile, moments: MomentsFile, sensitive: Mapping[str, float], names: Mapping[str, str]
) -> dict[str, str]:
    """Tensor → the module that its price is known of; an embedding that is no head by itself."""
    modules = {tensor: name.removesuffix(".weight") for name, tensor in names.items()}
    found = {}
    for group in moments.manifest.groups:
        head = group.key.split("/")[0] == HEAD
        for name in group.tensors:
            module = HEAD if head else modules.get(name, "")
            if module in sensitive:
                found[name] = module
    if EMBEDDING in source.tensors:
        found.setdefault(EMBEDDING, sensitivity.EMBEDDING)
    return found


def sampled_costs(
    price: Price, source: GGUFFile, types: Sequence[str], workers: int
) -> dict[str, float]:
    """Type → the nats that it is predicted to cost, from some of the tensor's rows.

    Raises:
        ModelError: a weight is not finite.
    """
    weights = weights_of(source, price.name)
    count = min(max(len(weights) // ROW_SHARE, FEWEST_ROWS), MOST_ROWS)
    rows = weights[list(chosen_rows(len(weights), count))]
    found = {}
    for type_ in types:
        stored = solve(rows, price.curvature, type_, passes=PASSES, threads=workers).stored
        delta = (rows - decoded(stored, type_, rows.shape)).astype(np.float64)
        found[type_] = price.nats(delta, len(weights))
    return found
