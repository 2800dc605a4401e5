"""Candidate against candidate: which is nearer to the reference, if the data tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from so8tqc.metrics.bootstrap import LEAST_TEXTS
from so8tqc.metrics.divergence import TokenTable
from so8tqc.metrics.paired import Differences, simultaneous_differences
from so8tqc.record_kinds.pairs import Comparisons, Measure, Pair
from so8tqc.services.qc.judging import Bootstrap

METHOD = (
    "Paired bootstrap-t over texts. The intervals of all pairs and of the three measures hold "
    "together with 95 % (max-T correction for multiple comparisons). A winner is named where the "
    "interval of the difference in mean KL to the reference excludes zero."
)

_COLUMNS = {"kl": "kl", "nll": "nll_candidate", "top1": "same_top"}
_MORE_IS_BETTER = frozenset({"top1"})


def compare_candidates(
    tables: Mapping[str, TokenTable], bootstrap: Bootstrap
) -> Comparisons | None:
    """Compare every two candidates on the same tokens; None if there are fewer than two.

    Args:
        tables: candidate → its table against the reference, all of one pass.
        bootstrap: resamples and seed.
    """
    pairs = list(combinations(tables, 2))
    return compare_pairs(tables, pairs, bootstrap) if pairs else None


def compare_pairs(
    tables: Mapping[str, TokenTable], pairs: Sequence[tuple[str, str]], bootstrap: Bootstrap
) -> Comparisons:
    """Compare these pairs of tables, whose intervals hold all at once.

    Args:
        tables: name → its table against its reference, all over the same tokens.
        pairs: which to compare, at least one.
        bootstrap: resamples and seed.
    """
    per_text = {name: table.per_text(*_COLUMNS.values()) for name, table in tables.items()}
    first = next(iter(per_text.values()))
    sums = np.concatenate([per_text[a][:, :-1] - per_text[b][:, :-1] for a, b in pairs], axis=1)
    found = simultaneous_differences(
        sums,
        first[:, -1],
        resamples=bootstrap.resamples,
        seed=bootstrap.seed,
        looks=bootstrap.looks,
    )
    return {
        "method": METHOD,
        "texts": first.shape[0],
        "critical": None if np.isnan(found.critical) else found.critical,
        "pairs": [_pair(a, b, found, i * len(_COLUMNS)) for i, (a, b) in enumerate(pairs)],
    }


def _pair(a: str, b: str, found: Differences, start: int) -> Pair:
    kl, nll, top1 = (_measure(a, b, m, found, start + i) for i, m in enumerate(_COLUMNS))
    return {
        "a": a,
        "b": b,
        "kl": kl,
        "nll": nll,
        "top1": top1,
        "winner": kl["better"],
        "sentence": _sentence(a, b, kl, top1),
    }


def _measure(a: str, b: str, measure: str, found: Differences, column: int) -> Measure:
    difference = float(found.values[column])
    low, high = float(found.low[column]), float(found.high[column])
    if np.isnan(low):
        return {"difference": difference, "ci95": None, "p": None, "better": None}
    better = None
    if low > 0 or high < 0:
        better = a if (low > 0) == (measure in _MORE_IS_BETTER) else b
    return {
        "difference": difference,
        "ci95": (low, high),
        "p": float(found.p[column]),
        "better": better,
    }


def _sentence(a: str, b: str, kl: Measure, top1: Measure) -> str:
    if kl["ci95"] is None:
        return f"Fewer than {LEAST_TEXTS} texts differ: {a} and {b} cannot be told apart."
    low, high = kl["ci95"]
    winner = kl["better"]
    if winner is None:
        return (
            f"The data do not tell {a} from {b}: their mean KL differs by "
            f"{kl['difference']:+.3g} nats ({low:+.3g} … {high:+.3g})."
        )
    loser = b if winner == a else a
    near, far = sorted((abs(low), abs(high)))
    said = (
        f"{winner} is nearer to the reference than {loser}: its mean KL is lower by "
        f"{abs(kl['difference']):.3g} nats ({near:.3g} … {far:.3g})"
    )
    if top1["better"] == loser:
        said += f", though {loser} has the reference's top token more often"
    return said + "."
