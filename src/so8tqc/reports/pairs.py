"""Two candidates on the same tokens: which is nearer to the reference, and by how much."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

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
    short = _short(found["pairs"])
    rows = [
        [
            f"{short[pair['a']]} − {short[pair['b']]}",
            *map(_difference, (pair["kl"], pair["nll"], pair["top1"])),
            _winner(pair, short),
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
    short = _short(found["pairs"])
    rows = [
        [
            f"{short[pair['a']]} − {short[pair['b']]}",
            _signed(pair["kl"]["difference"]),
            "" if pair["kl"]["ci95"] is None else " … ".join(map(_signed, pair["kl"]["ci95"])),
            _signed(pair["nll"]["difference"]),
            f"{100 * pair['top1']['difference']:+.1f} %",
            _winner(pair, short),
        ]
        for pair in found["pairs"]
    ]
    return Table(say(_PAIRS), [say("pair"), "KL", "95 %", "NLL", say("top"), say("nearer")], rows)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Name → what is left without the words that all of them begin with, and without ``.gguf``.

    The whole names are in the table of candidates; a pair of them would be wider than a page.
    """
    plain = [re.sub(r"\.gguf(?=$| \()", "", name) for name in names]
    words = [name.split("-") for name in plain]
    columns = zip(*(each[:-1] for each in words), strict=False)
    shared = next((i for i, column in enumerate(columns) if len(set(column)) > 1), None)
    if shared is None:
        shared = min(len(each) for each in words) - 1
    short = ["-".join(each[shared:]) for each in words]
    distinct = len(set(short)) == len(set(names)) and all(short)
    return dict(zip(names, short if distinct else names, strict=True))


def _short(pairs: Sequence[Pair]) -> dict[str, str]:
    return short_names(list(dict.fromkeys(n for pair in pairs for n in (pair["a"], pair["b"]))))


def _winner(pair: Pair, short: Mapping[str, str]) -> str:
    if pair["winner"]:
        return short[pair["winner"]]
    return say("too few texts") if pair["kl"]["ci95"] is None else say("undecided")


def _difference(measure: Measure) -> str:
    text, interval = _signed(measure["difference"]), measure["ci95"]
    return text if interval is None else f"{text} ({' … '.join(map(_signed, interval))})"


def _signed(value: float) -> str:
    return f"{value:+.3g}"
