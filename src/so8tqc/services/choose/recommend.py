"""Which of several measured files to ship, why, and how fast each is here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from so8tqc import wording
from so8tqc.config import ChoiceOptions
from so8tqc.llama.speed import measure_speeds
from so8tqc.progress import Progress
from so8tqc.record_kinds.choose import Row, Speeds
from so8tqc.services.choose.budget import Budget
from so8tqc.sources.protocol import TokenIds

DEFAULT_TOP1 = 0.9
"""Without a budget the smallest file is recommended that keeps the reference's most likely token
in nine of ten places."""

_PROMPT_TOKENS, _NEW_TOKENS = 256, 32


def recommend(
    rows: Mapping[str, Row], budget: Budget, config: ChoiceOptions, tried: int
) -> tuple[str, str]:
    """The recommended (or best found) of the files and the reason, a sentence.

    Args:
        rows: name → its row.
        budget: of ``config``.
        config: what is asked of a file.
        tried: how many files were evaluated.
    """
    if config.has_budget:
        asked, wanted = budget, f"the budget ({budget})"
    else:
        asked = Budget(None, DEFAULT_TOP1, None, by_interval=False)
        wanted = f"the reference's top token in at least {wording.percent(DEFAULT_TOP1)} of places"
    meeting = [name for name, row in rows.items() if not asked.missed(row)]
    if not meeting:
        name = min(rows, key=lambda name: (len(asked.missed(rows[name])), rows[name]["kl_mean"]))
        missed = "; ".join(asked.missed(rows[name]))
        return name, (
            f"None of the {wording.counted(tried, 'file')} tried keeps {wanted}; the nearest is "
            f"{name}: {_quality(rows[name])}. It misses: {missed}."
        )
    if config.has_budget and not budget.asks_quality:
        name = min(meeting, key=lambda name: rows[name]["kl_mean"])
        what = f"the lowest KL of the {wording.counted(tried, 'file')} tried within {wanted}"
    else:
        name = min(meeting, key=lambda name: rows[name]["bytes"])
        what = f"the smallest of the {wording.counted(tried, 'file')} tried that keeps {wanted}"
    return name, f"{name} is recommended: {what}; {_quality(rows[name])}."


def _quality(row: Row) -> str:
    interval = row["kl_ci95"]
    span = "" if interval is None else f" ({interval[0]:.3g} … {interval[1]:.3g})"
    return (
        f"{wording.size(row['bytes'])}, mean KL {row['kl_mean']:.3g}{span}, "
        f"same top {wording.percent(row['top1'])}"
    )


def speeds(
    paths: Mapping[str, Path],
    sample: TokenIds,
    *,
    repeats: int,
    threads: int | None,
    progress: Progress,
) -> Speeds:
    """Tokens per second of every file on this machine, and what was measured.

    Args:
        paths: name → GGUF file.
        sample: tokens to take the prompt and what follows from.
        repeats: rounds that count.
        threads: CPU threads, None for libllama's default.
        progress: told about every round.
    """
    tokens = sample[: _PROMPT_TOKENS + _NEW_TOKENS]
    new_tokens = min(_NEW_TOKENS, tokens.size // 2)
    rates = measure_speeds(
        paths, tokens, new_tokens=new_tokens, repeats=repeats, threads=threads, progress=progress
    )
    return {
        "files": rates,
        "prompt_tokens": int(tokens.size) - new_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "threads": threads,
        "cores": os.cpu_count(),
    }
