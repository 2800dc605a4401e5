"""What the checks of two runs measured, and whether a difference is more than chance."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np

from so8tqc.metrics.bootstrap import LEAST_TEXTS
from so8tqc.metrics.divergence import TokenTable
from so8tqc.record_kinds.comparison import Outcome, Value, VerdictChange
from so8tqc.record_kinds.pairs import Comparisons, Measure, Pair
from so8tqc.records import Check, judge
from so8tqc.services.compare.run import Run
from so8tqc.services.qc.judging import Bootstrap
from so8tqc.services.qc.pairwise import compare_pairs

_PAIRED: Mapping[str, Literal["kl", "top1"]] = {"kl.mean": "kl", "kl.top1": "top1"}
"""Checks whose values are means of a column of the token table."""


class Named(NamedTuple):
    """The key of a check in both runs; ``nth`` tells apart checks that share all else."""

    stage: str
    id: str
    subject: str
    nth: int


def named_checks(run: Run) -> dict[Named, Check]:
    found: dict[Named, Check] = {}
    for stage, record in run.stages.items():
        for check in record.checks:
            nth = 0
            while (name := Named(stage, check.id, run.plain(check.subject), nth)) in found:
                nth += 1
            found[name] = check
    return found


def changed_verdicts(a: Mapping[Named, Check], b: Mapping[Named, Check]) -> list[VerdictChange]:
    """Checks that ended otherwise, or that only one run has."""
    return [
        {
            "stage": name.stage,
            "id": name.id,
            "subject": name.subject,
            "a": _ended(a.get(name)),
            "b": _ended(b.get(name)),
            "detail": (b.get(name) or a[name]).detail,
        }
        for name in dict.fromkeys([*a, *b])
        if _ended(a.get(name)) != _ended(b.get(name))
    ]


def _ended(check: Check | None) -> str | None:
    if check is None:
        return None
    return f"{check.verdict}, allowed" if check.allowed else str(check.verdict)


def new_failures(a: Mapping[Named, Check], b: Mapping[Named, Check]) -> Check:
    new = [
        f"{name.id} of {name.subject}" if name.subject else name.id
        for name, check in b.items()
        if check.failed and not (name in a and a[name].failed)
    ]
    listed = ", ".join(new) if new else "none"
    return judge(
        "comparison.new_failures",
        len(new),
        0,
        comparison="==",
        detail=f"Checks that fail in B and did not fail in A: {listed}.",
    )


def compared_values(
    a: Mapping[Named, Check],
    b: Mapping[Named, Check],
    paired: Paired,
) -> list[Value]:
    """Every check that both runs have measured."""
    found: list[Value] = []
    for name in a:
        left, right = a[name], b.get(name)
        if right is None or left.value is None or right.value is None:
            continue
        measure = None
        if name.stage == "qc" and name.id in _PAIRED and name.subject in paired.pairs:
            measure = paired.pairs[name.subject][_PAIRED[name.id]]
        missing = paired.reason if name.id in _PAIRED else None
        outcome, how = _outcome(left, right, measure, missing)
        found.append(
            {
                "stage": name.stage,
                "id": name.id,
                "subject": name.subject,
                "unit": right.unit,
                "a": {"value": left.value, "ci95": left.ci95},
                "b": {"value": right.value, "ci95": right.ci95},
                "difference": right.value - left.value,
                "ci95": measure["ci95"] if measure else None,
                "outcome": outcome,
                "how": how,
            }
        )
    return found


def _outcome(
    a: Check, b: Check, measure: Measure | None, reason: str | None
) -> tuple[Outcome, str]:
    """What can be said of B's value against A's, and by what."""
    assert a.value is not None  # the caller's condition
    assert b.value is not None
    better: Outcome = "better" if (b.value < a.value) == (b.comparison in ("<=", "<")) else "worse"
    if measure is not None and measure["ci95"] is not None:
        low, high = measure["ci95"]
        if low == high == 0:
            return "equal", "equal in every text"
        told = low > 0 or high < 0
        return better if told else "undecided", f"paired over texts, p = {measure['p']:.3g}"
    if a.value == b.value:
        return "equal", "the same value"
    why = f"not paired: {reason}; " if reason else ""
    if a.ci95 is None or b.ci95 is None:
        return "not comparable", f"{why}no interval to judge the difference by"
    if a.ci95[1] < b.ci95[0] or b.ci95[1] < a.ci95[0]:
        return better, f"{why}the 95 % intervals do not meet"
    return "undecided", f"{why}the 95 % intervals overlap"


class Paired(NamedTuple):
    """Token tables compared, or why not.

    Attributes:
        reason: why they could not be compared, if they could not.
        note: what to know of the comparison.
        pairs: candidate → B against A.
        comparisons: all of them, as ``services.qc.pairwise`` gives them.
    """

    reason: str | None = None
    note: str = ""
    pairs: Mapping[str, Pair] = MappingProxyType({})
    comparisons: Comparisons | None = None


def compare_tables(a: Run, b: Run) -> Paired:
    """B's token tables against A's of the same candidates, if they are over the same tokens."""
    left = {a.plain(name): table for name, table in a.tables.items()}
    right = {b.plain(name): table for name, table in b.tables.items()}
    shared = [name for name in left if name in right]
    if not left or not right:
        return Paired(f"{'B' if left else 'A'} has no token table")
    if not shared:
        return Paired("no candidate is in both token tables")
    one, other = left[shared[0]], right[shared[0]]
    if reason := _other_tokens(one, other, a, b):
        return Paired(reason)
    note = ""
    if not np.array_equal(one.columns["nll_reference"], other.columns["nll_reference"]):
        note = "The references differ: each KL is to its own run's reference."
    tables = {f"A's {name}": left[name] for name in shared}
    tables |= {f"B's {name}": right[name] for name in shared}
    config = b.stages["qc"].config
    bootstrap = Bootstrap(int(str(config["resamples"])), int(str(config["seed"])))
    found = compare_pairs(tables, [(f"B's {name}", f"A's {name}") for name in shared], bootstrap)
    pairs = dict(zip(shared, found["pairs"], strict=True))
    few = pairs[shared[0]]["kl"]["ci95"] is None
    return Paired(f"fewer than {LEAST_TEXTS} texts" if few else None, note, pairs, found)


def _other_tokens(one: TokenTable, other: TokenTable, a: Run, b: Run) -> str | None:
    """Why two tables are not over the same tokens; None if they are."""
    if one.vocab_size != other.vocab_size:
        return f"the vocabularies have {one.vocab_size:,} and {other.vocab_size:,} tokens"
    if one.texts != other.texts:
        return "the texts are not the same"
    same = np.array_equal(one.text, other.text) and np.array_equal(one.position, other.position)
    if not same:
        return "the texts are cut or tokenized in another way"
    if np.array_equal(one.columns["nll_reference"], other.columns["nll_reference"]):
        return None  # the same model found the same tokens as likely
    data = [
        {
            name: ref.sha256
            for name, ref in run.stages["qc"].inputs.items()
            if name.startswith("data")
        }
        for run in (a, b)
    ]
    if data[0] != data[1]:
        return "the text files have other digests"
    return None
