"""The smallest mixture that keeps a budget, by what each tensor is predicted to cost.

Used where codes are solved for by second moments. ``quantize --max-size`` predicts what every
tensor costs in every type, so that the KL of any mixture is a sum. That KL is of the weights, on
calibration text; what is asked is of libllama, on the texts that judge. The files that were
measured say how the one goes with the other: between two of them on a line.

A limit for the size alone takes one file: the best of that size. For a quality the smallest size
is sought whose prediction should keep it; the file is made and measured, and tells the next guess
more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from so8tqc.gguf.file import GGUFFile
from so8tqc.quantizers.knapsack import Option, cheapest
from so8tqc.record_kinds.choose import Row
from so8tqc.record_kinds.quantize import Mixture, QuantizedFile
from so8tqc.records import Check
from so8tqc.services.choose.budget import Budget
from so8tqc.services.choose.search import Search, tried_file
from so8tqc.services.quantize.mixture import TooSmallError, stored_bytes

Numbers = npt.NDArray[np.float64]

MIXTURES = 3
"""Files made at most: with two types that is five evaluations."""

_NEAR = 0.003
"""Sizes that differ by less are not tried one after the other."""

_MARGIN = 0.02
"""How much better than asked a guess aims, as a share."""

_HALVINGS = 40


@dataclass(frozen=True)
class Made:
    """A mixture that was quantized.

    Attributes:
        path: the file.
        entry: what the record of ``quantize`` says of it.
        checks: of that record.
    """

    path: Path
    entry: QuantizedFile
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Measured:
    """A mixture with its row, and the KL that was predicted of its weights."""

    made: Made
    row: Row
    predicted: float


class Costs:
    """What each tensor costs in each type, from the record of ``quantize --max-size``.

    Args:
        mixture: of that record.
        source: the unquantized file.
    """

    def __init__(self, mixture: Mixture, source: GGUFFile) -> None:
        self._given = mixture.given
        self._options = {
            name: [
                Option(type_, stored_bytes(source.tensors[name], type_), cost)
                for type_, cost in chosen.kl.items()
            ]
            for name, chosen in mixture.tensors.items()
        }
        smallest = sum(min(o.bytes for o in some) for some in self._options.values())
        self._taken = mixture.smallest - smallest
        self.smallest, self.largest = mixture.smallest, mixture.largest

    def best(self, limit: int) -> tuple[dict[str, str], float]:
        """Tensor → type of the best file of a size, and its predicted KL."""
        chosen = cheapest(self._options, limit - self._taken)
        types = {name: option.type for name, option in chosen.items()}
        return {**types, **self._given}, sum(option.cost for option in chosen.values())

    def predicted(self, entry: QuantizedFile) -> float | None:
        """The KL that a file's types should cost; None if some are none of those predicted."""
        total = 0.0
        for name, options in self._options.items():
            costs = {option.type: option.cost for option in options}
            type_ = entry.tensors[name].type
            if type_ not in costs:
                return None
            total += costs[type_]
        return total

    def smallest_with(self, kl: float) -> int:
        """Bytes of the smallest file that is predicted to cost at most so much."""
        low, high = self.smallest, self.largest
        if self.best(low)[1] <= kl:
            return low
        for _ in range(_HALVINGS):  # low costs too much, high does not
            middle = (low + high) // 2
            if middle in (low, high):
                break
            if self.best(middle)[1] <= kl:
                high = middle
            else:
                low = middle
        return high


def best_of_size(
    limit: int,
    first: Callable[[int], tuple[Made, Mixture]],
    measure: Callable[[Made], Row],
    budget: Budget,
    found: Search,
) -> Measured | None:
    """One mixture for a size; what was tried is noted in ``found``."""
    try:
        made, mixture = first(limit)
    except TooSmallError as reason:
        found.ended = _sentence(reason)
        return None
    measured = _measured(made, mixture.predicted_kl, measure, budget, found)
    found.prediction = mixture
    found.ended = "Its types are those that are predicted to lose least in this size."
    return measured


def smallest_of_quality(
    rows: Mapping[str, Row],
    files: Mapping[str, QuantizedFile],
    budget: Budget,
    source: GGUFFile,
    first: Callable[[int], tuple[Made, Mixture]],
    of_types: Callable[[Mapping[str, str]], Made],
    measure: Callable[[Made], Row],
    found: Search,
    evaluations: int,
) -> Measured | None:
    """The smallest mixture found that keeps a quality, and is smaller than every type's file.

    Args:
        rows: type → its row.
        files: type → what it is.
        budget: what is asked.
        source: the unquantized file.
        first: makes the best file of a size, with the predictions.
        of_types: makes a file of types.
        measure: evaluates one.
        found: where it is noted what was tried.
        evaluations: files that may be made at most.
    """
    passing = [row["bytes"] for row in rows.values() if not budget.missed_quality(row)]
    failing = [row["bytes"] for row in rows.values() if budget.missed_quality(row)]
    if not passing:
        found.ended = "No type's file has the quality asked for."
        return None
    best: Measured | None = None
    bound = min(passing)
    smaller = [size for size in failing if size < bound]
    limit = (max(smaller) + bound) // 2 if smaller else int(0.9 * bound)
    tried: list[int] = []
    points: list[tuple[float, Row]] = []
    costs: Costs | None = None
    for _ in range(min(evaluations, MIXTURES)):
        if costs is None:
            try:
                made, mixture = first(limit)
            except TooSmallError as reason:
                found.ended = _sentence(reason)
                return None
            costs, predicted = Costs(mixture, source), mixture.predicted_kl
            found.prediction = mixture
            points = [
                (kl, row)
                for name, row in rows.items()
                if (kl := costs.predicted(files[name])) is not None
            ]
        else:
            types, predicted = costs.best(limit)
            made = of_types(types)
        measured = _measured(made, predicted, measure, budget, found)
        points.append((predicted, measured.row))
        tried.append(measured.row["bytes"])
        if not budget.missed_quality(measured.row) and measured.row["bytes"] < bound:
            best, bound = measured, measured.row["bytes"]
        limit = costs.smallest_with(_wanted(points, budget))
        if limit >= bound or any(abs(limit - size) < _NEAR * size for size in tried):
            break
    found.ended = (
        "No mixture that was tried is smaller than the types' files and keeps the budget."
        if best is None
        else f"The mixture is {1 - bound / min(passing):.1%} smaller than the smallest type's "
        "file that keeps the budget.".replace("%", " %")
    )
    return best


def _sentence(reason: TooSmallError) -> str:
    return f"{reason.what[:1].upper()}{reason.what[1:]}."


def _measured(
    made: Made, predicted: float, measure: Callable[[Made], Row], budget: Budget, found: Search
) -> Measured:
    row = measure(made)
    words = f"types by curvature, predicted KL {predicted:.4g}"
    found.tried.append(tried_file(words, "mixture", row, budget.missed(row)))
    return Measured(made, row, predicted)


def _wanted(points: list[tuple[float, Row]], budget: Budget) -> float:
    """The predicted KL with which what is asked should just be kept."""
    ordered = sorted(points, key=lambda point: point[0])
    predicted = np.array([0.0, *(kl for kl, _ in ordered)])
    limits = []
    if budget.max_kl is not None:
        # more predicted loss is never read as less measured
        kl = np.maximum.accumulate([0.0, *(budget.kl(row) for _, row in ordered)])
        limits.append(_where(kl, predicted, budget.max_kl * (1 - _MARGIN)))
    if budget.min_top1 is not None:
        lost = np.maximum.accumulate([0.0, *(1 - budget.top1(row) for _, row in ordered)])
        limits.append(_where(lost, predicted, (1 - budget.min_top1) * (1 - _MARGIN)))
    return min(limits)


def _where(measured: Numbers, predicted: Numbers, asked: float) -> float:
    """The predicted loss at which a measured one is ``asked``, on lines between the points."""
    if asked >= measured[-1] > 0:  # beyond the worst file: in proportion
        return float(predicted[-1] * asked / measured[-1])
    return float(np.interp(asked, measured, predicted))
