"""False alarms and delay of the online monitor, by simulation.

python benchmarks/monitor.py [RUNS]

Series: noise of three kinds, and the largest logits of SmolLM2-135M on the built-in long texts, cut
into blocks of 256 tokens that are drawn at random. A fault begins at token 1,000 and is as large as
stated, in standard deviations of the series. Every chart has its defaults: one false alarm in
100,000 tokens is what theory promises. The limit that is printed beside the rate is the promise.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
from scipy.signal import lfilter
from scipy.stats import chi2

from so8tqc.metrics.sequential import LoopWatch, OscillationChart, Statistic
from so8tqc.sources.compare import head_rows
from so8tqc.sources.hf import HFModel, HFSource
from so8tqc.sources.inputs.builtin import DEMO_MODEL, resolve_model
from so8tqc.sources.inputs.texts import encode, load_texts, load_tokenizer

TOKENS, BEGIN, BLOCK, PROMISED = 2048, 1000, 256, 100_000
STATISTICS: tuple[Statistic, ...] = ("index", "von_neumann")
Generator = np.random.Generator
Maker = Callable[[Generator], np.ndarray]


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    texts, series = demo_series()
    makers: dict[str, Maker] = {
        "white noise": lambda g: g.normal(size=TOKENS),
        "AR(1), φ = 0.8": lambda g: lfilter([1], [1, -0.8], g.normal(size=TOKENS + 64))[64:],
        "Student's t, 4 d.f.": lambda g: g.standard_t(4, size=TOKENS),
        "SmolLM2's logits": lambda g: resampled(series, g),
    }
    print(f"{runs} runs of {TOKENS} tokens each; promised: one false alarm in {PROMISED} tokens")
    for name, make in makers.items():
        for statistic in STATISTICS:
            false_alarms(name, make, statistic, runs)
    print(f"\nfound within {TOKENS - BEGIN} tokens, median and 90 % delay in tokens")
    for name, make in makers.items():
        for fault in FAULTS:
            for statistic in STATISTICS:
                delays(name, make, fault, statistic, max(1, runs // 5))
    print("\nas they are, without resampling:")
    for text, x in series.items():
        alarms = {s: first(OscillationChart(s), x) for s in STATISTICS}
        loops = sum(map(LoopWatch().update, texts[text].tolist()))
        print(f"{text}: first alarms {alarms}, {loops} loops")


def demo_series() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Tokens and largest logits of the built-in long texts."""
    directory = resolve_model(DEMO_MODEL)
    model = HFSource(HFModel.load(directory), "demo")
    tokens, series = {}, {}
    for text in encode(load_texts(["builtin:longtext"]), load_tokenizer(directory), TOKENS):
        blocks = model.logits(text.tokens, head_rows(model.vocab_size))
        series[text.id] = np.concatenate([block.amax(dim=1).double().numpy() for block in blocks])
        tokens[text.id] = text.tokens
    return tokens, series


def resampled(series: dict[str, np.ndarray], generator: Generator) -> np.ndarray:
    """Blocks of one text, in any order."""
    x = list(series.values())[int(generator.integers(len(series)))]
    starts = generator.integers(x.size - BLOCK + 1, size=TOKENS // BLOCK)
    return np.concatenate([x[start : start + BLOCK] for start in starts])


def first(chart: OscillationChart, x: np.ndarray) -> int | None:
    """Token of the first alarm."""
    return next((i for i, value in enumerate(x) if chart.update(float(value))), None)


def false_alarms(name: str, make: Maker, statistic: Statistic, runs: int) -> None:
    """Alarms of unchanged series for the tokens watched, with Garwood's interval for the rate."""
    generator = np.random.default_rng(0)
    alarms, watched = 0, 0
    for _ in range(runs):
        at = first(OscillationChart(statistic), make(generator))
        alarms += at is not None
        watched += TOKENS if at is None else at + 1
    low, high = (
        chi2.ppf(0.025, 2 * alarms) / 2 if alarms else 0.0,
        chi2.ppf(0.975, 2 * alarms + 2) / 2,
    )
    scale = 1e5 / watched
    print(f"| {name} | {statistic} | {alarms} of {runs} | {alarms * scale:.2f} "
          f"({low * scale:.2f} … {high * scale:.2f}) |", flush=True)  # fmt: skip


def alternating(x: np.ndarray, size: float, _: Generator) -> np.ndarray:
    return x + size * x.std() * np.where(np.arange(x.size) % 2, 1.0, -1.0)


def noisy(x: np.ndarray, size: float, generator: Generator) -> np.ndarray:
    return x + size * x.std() * generator.normal(size=x.size)


def louder(x: np.ndarray, size: float, _: Generator) -> np.ndarray:
    return x.mean() + size * (x - x.mean())


FAULTS = [
    (alternating, 0.5), (alternating, 1.0), (alternating, 2.0),
    (noisy, 0.5), (noisy, 1.0), (noisy, 2.0), (louder, 1.5), (louder, 2.0),
]  # fmt: skip


def delays(
    name: str,
    make: Maker,
    fault: tuple[Callable[[np.ndarray, float, Generator], np.ndarray], float],
    statistic: Statistic,
    runs: int,
) -> None:
    change, size = fault
    generator = np.random.default_rng(1)

    def alarm() -> int | None:
        x = make(generator)
        x[BEGIN:] = change(x, size, generator)[BEGIN:]
        return first(OscillationChart(statistic), x)

    found = []
    for _ in range(runs):
        at = alarm()
        while at is not None and at < BEGIN:  # a false alarm: this run says nothing
            at = alarm()
        if at is not None:
            found.append(at - BEGIN)
    all_runs = np.array(found + [np.inf] * (runs - len(found)))
    median, late = np.quantile(all_runs, [0.5, 0.9], method="higher")
    print(f"| {name} | {change.__name__} {size} | {statistic} | {100 * len(found) / runs:.0f} % | "
          f"{median:.0f} | {late:.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
