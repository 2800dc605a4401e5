"""Two candidates on the same tokens: which is nearer to the reference, and by how much."""

from __future__ import annotations

from so8tqc.record_kinds.pairs import ComparedMetrics, Measure, Pair
from so8tqc.records import Record
from so8tqc.reports.language import message, say
from so8tqc.reports.tables import Table

_PAIRS = message("Pair by pair (intervals hold together with 95 %)")


def pair_table(record: Record) -> Table | None:
    """Every two candidates: differences with simultaneous intervals, and the winner."""
    found = ComparedMetrics.of(record).comparisons
    if found is None:
        return None
    rows = [
        [
            f"{pair['a']} − {pair['b']}",
            *map(_difference, (pair["kl"], pair["nll"], pair["top1"])),
            _winner(pair),
        ]
        for pair in found["pairs"]
    ]
    return Table(
        say(_PAIRS),
        [say("pair"), "KL", "NLL", say("same top"), say("nearer to the reference")],
        rows,
    )


def narrow_pairs(record: Record) -> Table | None:
    """The pairs with the interval of the KL alone."""
    found = ComparedMetrics.of(record).comparisons
    if found is None:
        return None
    rows = [
        [
            f"{pair['a']} − {pair['b']}",
            _signed(pair["kl"]["difference"]),
            "" if pair["kl"]["ci95"] is None else " … ".join(map(_signed, pair["kl"]["ci95"])),
            _signed(pair["nll"]["difference"]),
            f"{100 * pair['top1']['difference']:+.1f} %",
            _winner(pair),
        ]
        for pair in found["pairs"]
    ]
    return Table(say(_PAIRS), [say("pair"), "KL", "95 %", "NLL", say("top"), say("nearer")], rows)


def _winner(pair: Pair) -> str:
    if pair["winner"]:
        return pair["winner"]
    return say("too few texts") if pair["kl"]["ci95"] is None else say("undecided")


def _difference(measure: Measure) -> str:
    text, interval = _signed(measure["difference"]), measure["ci95"]
    return text if interval is None else f"{text} ({' … '.join(map(_signed, interval))})"


def _signed(value: float) -> str:
    return f"{value:+.3g}"
