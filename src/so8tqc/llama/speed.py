"""Tokens per second of GGUF files on this machine, measured side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from so8tqc.llama.isolated import IsolatedModel
from so8tqc.progress import SILENT, Progress
from so8tqc.record_kinds.choose import Rate, Speed


def measure_speeds(
    files: Mapping[str, Path],
    tokens: npt.NDArray[np.int64],
    *,
    new_tokens: int,
    repeats: int,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, Speed]:
    """Time every file with the same tokens.

    Each repeat times all files in turn, so that whatever slows the machine down for a while
    slows all of them; the first round warms up and is not counted. Times are taken in the
    worker, around libllama's own computation.

    Args:
        files: name → GGUF file.
        tokens: [P + N] ids: a prompt of P, then the N tokens that are fed one by one.
        new_tokens: N; how fast a token is computed does not depend on which one it is.
        repeats: rounds that count.
        threads: CPU threads, None for libllama's default.
        progress: told about each file of each round.

    Raises:
        ModelError: not a loadable GGUF.
        MissingToolError: no libllama.
        DataError: the tokens do not fit a model's context.
    """
    models: dict[str, IsolatedModel] = {}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in files}
    total = len(files) * (repeats + 1)
    with progress.task("measuring speed", total=total, unit="runs") as task:
        try:
            for name, path in files.items():
                models[name] = IsolatedModel(path, threads=threads, context=tokens.size)
            for _ in range(repeats + 1):
                for name, model in models.items():
                    seconds[name].append(_once(model, tokens, new_tokens))
                    task.advance(1, item=name)
        finally:
            for model in models.values():
                model.close()
    prompt = tokens.size - new_tokens
    return {
        name: {
            "prompt": _rate(prompt, [first for first, _ in times[1:]]),
            "generation": _rate(new_tokens, [second for _, second in times[1:]]),
        }
        for name, times in seconds.items()
    }


def _once(
    model: IsolatedModel, tokens: npt.NDArray[np.int64], new_tokens: int
) -> tuple[float, float]:
    """Seconds of the prompt, and of all later tokens."""
    prompt = tokens.size - new_tokens
    model.begin(tokens.size)
    reading = model.time(tokens[:prompt], 0)
    return reading, sum(model.time(tokens[i : i + 1], i) for i in range(prompt, tokens.size))


def _rate(tokens: int, seconds: list[float]) -> Rate:
    rates = tokens / np.array(seconds)
    return {
        "median": float(np.median(rates)),
        "low": float(rates.min()),
        "high": float(rates.max()),
    }
