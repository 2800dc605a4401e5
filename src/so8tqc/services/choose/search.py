"""The smallest mixture of two types that keeps a budget, by measured sensitivity.

First the types themselves. Let *high* be the smallest of their files that keeps the budget, and
*low* the best of the smaller ones, which do not. Every file between them stores some tensors as low
does and the others as high does, and all of these are made by copying tensors
(``gguf.mixture``), so that nothing is quantized for the search.

*Sensitivity*: the tensors in which the two differ are grouped by what they are (``ffn_down``, …)
and by depth. For each group g a file is evaluated in which only g is stored as low does; KL(g) −
KL(high) is what storing it so costs, and the bytes it saves are known. Groups are then lowered in
the order of cost per byte saved, which is to say that the most sensitive ones stay raised, and how
far one can go is found by section search over the prefixes of that order. At last, single later
groups are tried in addition where the costs' sum predicts that they fit.

With a limit for the size alone the search turns round: low is the best file that fits, high the
smallest better one that does not, and groups are raised in the order of cost per byte while they
fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from so8tqc.gguf.file import GGUFFile
from so8tqc.gguf.mixture import mix, mixture_bytes
from so8tqc.record_kinds.choose import Row, Sensitivity, Tried
from so8tqc.record_kinds.quantize import Mixture as CurvatureMixture
from so8tqc.services.choose.budget import Budget
from so8tqc.services.choose.groups import Group, groups

_AT_ONCE = 4
"""Mixtures of one round: they share the reference's logits."""


Evaluate = Callable[[Mapping[str, Path], bool], dict[str, Row]]
"""Names and files, whether they are also compared with the base → rows."""


@dataclass(frozen=True)
class Mixture:
    """``low`` with the tensors ``raised`` as in ``high``: what was evaluated, and its row."""

    low: str
    high: str
    lowered: tuple[str, ...]
    raised: frozenset[str]
    path: Path
    row: Row

    @property
    def recipe(self) -> str:
        """The recipe in words."""
        return f"{self.high}, as {self.low} in {', '.join(self.lowered)}"


@dataclass
class Search:
    """The result of a search: files evaluated, and the mixture chosen.

    Attributes:
        tried: every evaluated file, in order.
        sensitivity: of the groups, most sensitive first.
        mixture: the mixture that is better than every type's file, None if none is.
        low, high: the two types, "" if no mixture was searched.
        ended: why the search ended, a sentence.
        name: what the chosen mixture is called beside the types; None: none was chosen.
        prediction: of a search by curvature, what types were chosen by.
    """

    tried: list[Tried] = field(default_factory=list)
    sensitivity: list[Sensitivity] = field(default_factory=list)
    mixture: Mixture | None = None
    low: str = ""
    high: str = ""
    ended: str = ""
    name: str | None = None
    prediction: CurvatureMixture | None = None


@dataclass(frozen=True)
class _Costed:
    group: Group
    cost: float


def search(
    ladder: Mapping[str, GGUFFile],
    rows: Mapping[str, Row],
    budget: Budget,
    evaluate: Evaluate,
    folder: Path,
    evaluations: int,
) -> Search:
    """Search mixtures of two types after the types themselves were evaluated.

    Args:
        ladder: type → its file.
        rows: type → its row.
        budget: what is asked.
        evaluate: measures files.
        folder: where mixtures are written; the caller removes it.
        evaluations: how many files may be evaluated beyond the types.
    """
    found = Search(
        tried=[tried_file(name, "type", row, budget.missed(row)) for name, row in rows.items()]
    )
    ends = _ends(rows, budget)
    if isinstance(ends, str):
        found.ended = ends
        return found
    found.low, found.high = ends
    between = _Between(ladder[ends[0]], ladder[ends[1]], *ends, budget, evaluate, folder, found)
    between.left = evaluations
    between.run(rows)
    return found


def _ends(rows: Mapping[str, Row], budget: Budget) -> tuple[str, str] | str:
    """The two types to mix, or why there are none."""
    by_size = sorted(rows, key=lambda name: rows[name]["bytes"])
    if not budget.asks_quality:
        fitting = [name for name in by_size if not budget.missed(rows[name])]
        if not fitting:
            return "No type's file fits, and mixtures are no smaller."
        low = min(fitting, key=lambda name: rows[name]["kl_mean"])
        better = [
            name
            for name in by_size
            if name not in fitting and rows[name]["kl_mean"] < rows[low]["kl_mean"]
        ]
        return (low, better[0]) if better else f"No larger file is better than that of {low}."
    passing = [name for name in by_size if not budget.missed_quality(rows[name])]
    if not passing:
        return "No type's file has the quality asked for, and mixtures lie between them."
    high = passing[0]
    smaller = [name for name in by_size if rows[name]["bytes"] < rows[high]["bytes"]]
    if not smaller:
        return f"{high} is the smallest type given."
    return min(smaller, key=lambda name: rows[name]["kl_mean"]), high


def tried_file(recipe: str, purpose: str, row: Row, missed: list[str]) -> Tried:
    """An evaluated file, as a record shows it."""
    return {
        "recipe": recipe,
        "purpose": purpose,
        "bytes": row["bytes"],
        "kl_mean": row["kl_mean"],
        "kl_ci95": row["kl_ci95"],
        "top1": row["top1"],
        "missed": missed,
    }


class _Between:
    """The search between two types' files.

    Attributes:
        left: evaluations that may still be made.
    """

    def __init__(
        self,
        low: GGUFFile,
        high: GGUFFile,
        low_name: str,
        high_name: str,
        budget: Budget,
        evaluate: Evaluate,
        folder: Path,
        found: Search,
    ) -> None:
        self._low, self._high = low, high
        self._names = (low_name, high_name)
        self._budget, self._evaluate, self._folder, self._found = budget, evaluate, folder, found
        self._differ = frozenset(
            name
            for name, tensor in low.tensors.items()
            if (tensor.type, tensor.bytes) != (high.tensors[name].type, high.tensors[name].bytes)
        )
        self.left = 0

    def run(self, rows: Mapping[str, Row]) -> None:
        """Measure the groups, then search."""
        reserved = min(_AT_ONCE, max(1, self.left - 1))
        made = groups(self._low, self._high, self.left - reserved) if self.left > 1 else []
        if not made:
            self._found.ended = "No evaluations are left for mixtures."
            return
        base = rows[self._names[1]]["kl_mean"]
        singles = self._measure({group.name: (group,) for group in made}, "sensitivity")
        costed = [
            _Costed(group, single.row["kl_mean"] - base)
            for group, single in zip(made, singles, strict=True)
        ]
        # what saves many bytes at little cost is lowered first
        costed.sort(key=lambda c: c.cost / c.group.bytes)
        self._found.sensitivity = [
            {
                "group": c.group.name,
                "tensors": len(c.group.tensors),
                "bytes_saved": c.group.bytes,
                "kl_cost": c.cost,
            }
            for c in reversed(costed)
        ]
        if self._budget.asks_quality:
            self._lower(costed, rows)
        else:
            self._raise(costed, rows)

    def _lower(self, costed: Sequence[_Costed], rows: Mapping[str, Row]) -> None:
        """Find how many groups can be lowered."""
        order = [c.group for c in costed]
        # all groups lowered may be the lower type's own file, which is known to fail
        passing, failing = 0, len(order) + (0 if self._is_low(order) else 1)
        best: Mixture | None = None
        while failing - passing > 1 and self.left:
            depths = _sections(passing, failing, min(_AT_ONCE, self.left))
            made = self._measure({f"{depth}": order[:depth] for depth in depths}, "mixture")
            for depth, mixture in zip(depths, made, strict=True):
                if self._budget.missed_quality(mixture.row):
                    failing = depth
                    break
                passing, best = depth, mixture
        self._found.mixture = best
        if best is not None:
            self._fill(best, passing, costed)
        self._found.ended = self._ending(failing - passing == 1, rows)

    def _is_low(self, order: Sequence[Group]) -> bool:
        return self._differ == {tensor for group in order for tensor in group.tensors}

    def _ending(self, complete: bool, rows: Mapping[str, Row]) -> str:
        if not complete:
            return "The evaluations were used up; a smaller file may exist."
        if self._found.mixture is None:
            return f"No mixture with {self._names[0]} keeps the budget."
        saved = 1 - self._found.mixture.row["bytes"] / rows[self._names[1]]["bytes"]
        return f"The mixture is {saved:.1%} smaller than {self._names[1]}.".replace("%", " %")

    def _fill(self, best: Mixture, depth: int, costed: Sequence[_Costed]) -> None:
        """Lower single groups beyond the prefix where their predicted costs fit."""
        limit = self._budget.max_kl if self._budget.max_kl is not None else math.inf
        room = limit - self._budget.kl(best.row)
        later = [c for c in costed[depth + 1 :] if c.cost <= room]
        later.sort(key=lambda c: -c.group.bytes)
        prefix = [c.group for c in costed[:depth]]
        count = min(_AT_ONCE, self.left)
        trials = {f"{depth} and {c.group.name}": (*prefix, c.group) for c in later[:count]}
        for trial in self._measure(trials, "mixture"):
            fits = not self._budget.missed_quality(trial.row)
            current = self._found.mixture
            if fits and (current is None or trial.row["bytes"] < current.row["bytes"]):
                self._found.mixture = trial

    def _raise(self, costed: Sequence[_Costed], rows: Mapping[str, Row]) -> None:
        """Raise the most sensitive groups that fit."""
        limit = self._budget.max_bytes
        assert limit is not None  # a budget that asks neither quality nor size is none
        lowered = {c.group.name: c.group for c in costed}
        for c in reversed(costed):
            without = [group for name, group in lowered.items() if name != c.group.name]
            if mixture_bytes(self._low, self._high, self._raised(without)) <= limit:
                del lowered[c.group.name]
        if len(lowered) == len(costed):
            self._found.ended = "No group of tensors fits in the higher type."
            return
        (trial,) = self._measure({"fitting": tuple(lowered.values())}, "mixture")
        better = trial.row["kl_mean"] < rows[self._names[0]]["kl_mean"]
        if better and not self._budget.missed(trial.row):
            self._found.mixture = trial
            self._found.ended = f"Its KL is lower than that of {self._names[0]}."
        else:
            self._found.ended = f"The mixture is not better than {self._names[0]}."

    def _raised(self, lowered: Sequence[Group]) -> frozenset[str]:
        return self._differ - {tensor for group in lowered for tensor in group.tensors}

    def _measure(self, lowered: Mapping[str, Sequence[Group]], purpose: str) -> list[Mixture]:
        """Write and evaluate mixtures; they are noted as tried."""
        files: dict[str, tuple[Sequence[Group], frozenset[str], Path]] = {}
        for name, chosen in lowered.items():
            raised = self._raised(chosen)
            path = self._folder / f"{len(self._found.tried) + len(files)}.gguf"
            mix(self._low, self._high, raised, path)
            files[name] = (chosen, raised, path)
        if not files:
            return []
        against_base = purpose == "mixture"
        rows = self._evaluate({name: path for name, (_, _, path) in files.items()}, against_base)
        self.left -= len(files)
        measured = []
        for name, (chosen, raised, path) in files.items():
            names = tuple(group.name for group in chosen)
            mixture = Mixture(*self._names, names, raised, path, rows[name])
            missed = self._budget.missed(rows[name])
            self._found.tried.append(tried_file(mixture.recipe, purpose, rows[name], missed))
            measured.append(mixture)
        return measured


def _sections(passing: int, failing: int, count: int) -> list[int]:
    """At most ``count`` numbers strictly between two, evenly spaced."""
    gap = failing - passing - 1
    count = min(count, gap)
    return sorted({passing + round((i + 1) * (gap + 1) / (count + 1)) for i in range(count)})
