"""Texts are taken until an interval is narrow enough, and what that makes of the interval.

To look after every text and stop where the interval happens to be narrow would claim more than was
measured: a spread that is by chance too small ends the walk. So the numbers of texts at which is
looked are fixed before the first (each twice the last), and each interval has the level at which
those of *all* planned looks hold together with 95 % (Bonferroni): whichever of them the walk ends
at, its interval covers what it claims to. The texts come in an order drawn by the seed, so that any
first part of them is a sample of the whole. The mean itself may be low by a part of its interval,
since where little divergence was seen the interval is narrow, too; the interval allows for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from so8tqc.metrics.bootstrap import LEAST_TEXTS, paired_bootstrap, ratio_of_sums
from so8tqc.metrics.divergence import TokenTable, joined
from so8tqc.record_kinds.qc import Look, Sequential
from so8tqc.services.qc.judging import Bootstrap
from so8tqc.sources.compare import Pair
from so8tqc.sources.protocol import EncodedText

FIRST_LOOK = 4 * LEAST_TEXTS
"""Texts before the first look: with fewer, an interval says more of chance than of the model."""

Compare = Callable[[Sequence[EncodedText]], Mapping[Pair, TokenTable]]


def planned_looks(texts: int) -> list[int]:
    """Numbers of texts at which is looked: FIRST_LOOK, each twice the last, and all."""
    looks = []
    count = FIRST_LOOK
    while count < texts:
        looks.append(count)
        count *= 2
    return [*looks, texts]


def in_drawn_order(texts: Sequence[EncodedText], seed: int) -> list[list[EncodedText]]:
    """The texts, each with all its windows, in an order drawn by the seed."""
    whole: dict[str, list[EncodedText]] = {}
    for text in texts:
        whole.setdefault(text.id, []).append(text)
    groups = list(whole.values())
    order = np.random.default_rng(seed).permutation(len(groups))
    return [groups[i] for i in order]


def compare_until(
    compare: Compare,
    judged: Sequence[Pair],
    texts: Sequence[EncodedText],
    until: float,
    bootstrap: Bootstrap,
) -> tuple[dict[Pair, TokenTable], tuple[EncodedText, ...], Sequential]:
    """Compare on more and more texts, until every judged pair's mean KL is known well enough.

    Args:
        compare: token tables of all pairs on some texts.
        judged: pairs whose intervals decide.
        texts: all that there are.
        until: largest width of an interval, nats.
        bootstrap: of the intervals, and the seed of the order; its ``looks`` are not used.

    Returns:
        The tables, the texts that they are of, and how it went.
    """
    groups = in_drawn_order(texts, bootstrap.seed)
    planned = planned_looks(len(groups))
    parts: list[Mapping[Pair, TokenTable]] = []
    looks: list[Look] = []
    tables: dict[Pair, TokenTable] = {}
    done = 0
    for count in planned:
        parts.append(compare([window for group in groups[done:count] for window in group]))
        tables = {pair: joined([part[pair] for part in parts]) for pair in parts[0]}
        done = count
        widths = [_width(tables[pair], bootstrap, len(planned)) for pair in judged]
        widest = None if None in widths else max((w for w in widths if w is not None), default=None)
        looks.append({"texts": count, "width": widest})
        if widest is not None and widest <= until:
            break
    last = looks[-1]["width"]
    used = tuple(window for group in groups[:done] for window in group)
    return (
        tables,
        used,
        Sequential(
            until=until,
            texts=done,
            given=len(groups),
            planned=planned,
            looks=looks,
            level=1 - 0.05 / len(planned),
            reached=last is not None and last <= until,
        ),
    )


def _width(table: TokenTable, bootstrap: Bootstrap, looks: int) -> float | None:
    """Of the interval of a table's mean KL; None with too few texts for one."""
    low, high = paired_bootstrap(
        table.per_text("kl"),
        ratio_of_sums,
        resamples=bootstrap.resamples,
        seed=bootstrap.seed,
        looks=looks,
    )
    return None if np.isnan(low) else high - low


def sequential_notice(found: Sequential) -> str:
    """How many texts were taken, why no more, and what holds of the intervals."""
    width = found.looks[-1]["width"]
    shown = "none" if width is None else f"{width:.2g} nats"
    ended = (
        f"{found.texts} of {found.given} texts were taken: the widest interval of a mean KL is "
        f"then {shown}, at most {found.until:g}."
        if found.reached
        else f"All {found.given} texts were taken, and the widest interval of a mean KL is "
        f"{shown}, more than {found.until:g}: give more text."
    )
    return (
        f"{ended} Texts came in an order drawn by the seed, and it was asked at numbers fixed "
        f"before ({', '.join(map(str, found.planned))}). Each interval has a level of "
        f"{100 * found.level:.2f} %, so that those of all these numbers hold together with 95 %, "
        "wherever the walk ends; the mean itself may be low within it."
    )
