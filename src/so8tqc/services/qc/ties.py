"""Tokens whose experts rounding may choose otherwise: counted apart, where enough others are left.

Another expert then runs, and the token's logits differ by much more than the arithmetic's error,
whoever stored the weights. Which tokens these are is told by the reference and by our own fold, not
by a candidate: a wrong one excuses nothing.
"""

from __future__ import annotations

from so8tqc.metrics.divergence import TokenTable, summarise
from so8tqc.record_kinds.qc import Routing, Statistics
from so8tqc.wording import percent

LEAST_SHARE = 0.5
"""Of the tokens that must be left to be judged without the others: of a large model with many
routers nearly every token is at a tie, and all of them are judged, as is the noise floor."""


def judged(table: TokenTable) -> TokenTable:
    """The tokens by which a candidate is judged: those at no tie, if at least half are."""
    if table.tie is None or not table.tie.any() or table.tie.mean() > 1 - LEAST_SHARE:
        return table
    return table.where(~table.tie)


def routing(table: TokenTable) -> Routing | None:
    """Statistics of the two kinds of tokens; None where no token is at a tie."""
    if table.tie is None or not table.tie.any():
        return None
    return Routing(
        ties=_statistics(table.where(table.tie)),
        others=None if table.tie.all() else _statistics(table.where(~table.tie)),
        apart=judged(table) is not table,
    )


def routing_notice(table: TokenTable) -> str | None:
    """How many tokens are at a tie, and whether they are judged with the others."""
    if table.tie is None or not table.tie.any():
        return None
    count, share = int(table.tie.sum()), float(table.tie.mean())
    what = (
        "they are counted apart, and candidates are judged by the others"
        if judged(table) is not table
        else "they are judged with the others, since fewer than half of the tokens are none"
    )
    return (
        f"Rounding may turn the choice of experts at {count:,} of {len(table):,} tokens "
        f"({percent(share)}): {what}."
    )


def _statistics(table: TokenTable) -> Statistics:
    return Statistics.model_validate(summarise(table))
