"""so8tqc beside llama.cpp's own llama-perplexity: the same numbers, and how long both take.

python benchmarks/llama_perplexity.py TOOL REFERENCE.gguf CANDIDATE.gguf... [--data FILE]
    [--ctx 512] [--windows N] [--threads N] [--repeat N]

TOOL is the llama-perplexity executable, built from the pinned llama.cpp (docs/protocols.md).
It makes one base pass and one KL pass for each candidate; so8tqc makes one pass of all.
For each statistic: both values, their distance, and how far the tool's own base file (16-bit
log-probabilities) may put it off. The exit code is 1 if a distance is larger than that.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from process_time import cpu_seconds
from so8tqc.config import QCConfig
from so8tqc.metrics.divergence import TokenTable, summarise
from so8tqc.services.qc.texts import evaluation_texts
from so8tqc.sources.compare import Pair, compare, head_rows
from so8tqc.sources.gguf import open_together
from so8tqc.sources.inputs.texts import concatenated, load_texts
from so8tqc.sources.protocol import EncodedText

SMALLEST_STORED = -16.0
"""The tool keeps 16 nats below the largest logit, and skips what is less likely than e⁻¹⁶."""

FLOAT32 = 2.0**-22
"""Relative error of the tool's few float32 operations on numbers of a logit's size."""


@dataclass(frozen=True)
class Cost:
    """Seconds on the clock, and of the processor (all threads)."""

    wall: float
    cpu: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall + other.wall, self.cpu + other.cpu)


def least(costs: Sequence[Cost]) -> Cost:
    """What other programs disturbed least."""
    return Cost(min(cost.wall for cost in costs), min(cost.cpu for cost in costs))


@dataclass(frozen=True)
class Row:
    """One printed statistic: where the tool has it, what so8tqc calls it, its bound.

    Attributes:
        label: as the tool prints it.
        ours: from ``summarise``, in the tool's unit.
        bound: largest distance the base file's rounding explains, likewise.
    """

    label: str
    ours: float
    bound: float


def main() -> None:
    options = _arguments()
    torch.set_num_threads(options.threads)
    config = QCConfig(
        reference=options.reference,
        candidates=tuple(options.candidates),
        data=tuple(options.data),
        protocol="llama-perplexity",
        ctx=options.ctx,
        max_tokens=options.windows and options.windows * options.ctx,
        out=Path(),
    )
    tool_costs, costs = [], []
    for _ in range(options.repeat):
        with tempfile.TemporaryDirectory() as directory:
            theirs, tool_cost, written = _run_tool(options, config, Path(directory))
        texts, tables, cost = _run_ours(config, options.threads)
        tool_costs.append(tool_cost)
        costs.append(cost)
    tool_cost, cost = least(tool_costs), least(costs)
    roundings = _base_file_roundings(options, texts)
    agrees = True
    for path in options.candidates:
        agrees &= _show(path.name, theirs[path], _rows(tables[path], roundings[path]))
    tokens = sum(text.tokens.size for text in texts)
    scored = sum(text.tokens.size - 1 - text.first for text in texts)
    print(f"\n{tokens} tokens, {scored} scored; {options.threads} thread(s); "
          f"1 reference and {len(options.candidates)} candidates")  # fmt: skip
    for name, one, bytes_written in (
        ("llama-perplexity", tool_cost, written), ("so8tqc", cost, 0)
    ):  # fmt: skip
        print(f"{name:18}{one.wall:8.1f} s{one.cpu:8.1f} s of processor"
              f"{bytes_written / 1e6:10.1f} MB written")  # fmt: skip
    print(f"so8tqc takes {cost.wall / tool_cost.wall:.3f} × the time, "
          f"{cost.cpu / tool_cost.cpu:.3f} × the processor time")  # fmt: skip
    sys.exit(0 if agrees else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tool", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("candidates", type=Path, nargs="+")
    parser.add_argument("--data", nargs="+", default=["builtin:validation"])
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--windows", type=int, help="only the first so many; default all")
    parser.add_argument("--repeat", type=int, default=1, help="times; the least of each counts")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


def _run_tool(
    options: argparse.Namespace, config: QCConfig, directory: Path
) -> tuple[dict[Path, dict[str, float]], Cost, int]:
    """Printed statistics of each candidate, time of all passes, size of the base file."""
    text, base = directory / "text", directory / "base"
    text.write_bytes(concatenated(load_texts(config.data)).encode())
    common = [options.tool, "-c", options.ctx, "-t", options.threads, "--kl-divergence-base", base]
    chunks = ["--chunks", options.windows] if options.windows else []
    _, cost = _timed_command([*common, *chunks, "-m", config.reference, "-f", text])
    results = {}
    for path in config.candidates:
        output, more = _timed_command([*common, "-m", path, "--kl-divergence"])
        results[path] = {
            label.strip(): float(value)
            for label, value in re.findall(r"^([^:\n]+):\s+(-?[\d.]+)", output, re.MULTILINE)
        }
        cost += more
    return results, cost, base.stat().st_size


def _timed_command(command: Sequence[object]) -> tuple[str, Cost]:
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [str(part) for part in command], check=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
    )  # fmt: skip
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, Cost(wall, cpu)


def _run_ours(
    config: QCConfig, threads: int
) -> tuple[tuple[EncodedText, ...], dict[Path, TokenTable], Cost]:
    """Windows, token table of each candidate, and the time from files to tables."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    texts = evaluation_texts(config, _no_tokenizer)
    paths = (config.reference, *config.candidates)
    sources = open_together({str(path): path for path in paths}, threads=threads)
    pairs: dict[Path, Pair] = {
        path: (str(config.reference), str(path)) for path in config.candidates
    }
    tables = compare(sources, list(pairs.values()), texts)
    for path in config.candidates:
        summarise(tables[pairs[path]])
    for source in sources:
        source.close()
    cost = Cost(time.perf_counter() - wall, cpu_seconds() - cpu)
    return texts, {path: tables[pair] for path, pair in pairs.items()}, cost


def _no_tokenizer() -> None:
    raise AssertionError("a GGUF file has its own")


@dataclass(frozen=True)
class Rounding:
    """What the base file's rounding may change, each [n], of every scored token.

    Attributes:
        kl: nats.
        nll: of the reference, nats.
        delta_p: probability.
        top: whether the largest two stored log-probabilities may change places.
    """

    kl: np.ndarray
    nll: np.ndarray
    delta_p: np.ndarray
    top: np.ndarray


def _base_file_roundings(
    options: argparse.Namespace, texts: Sequence[EncodedText]
) -> dict[Path, Rounding]:
    """Bounds by the derivation in docs/protocols.md, from the logits themselves."""
    paths = [options.reference, *options.candidates]
    sources = open_together({str(path): path for path in paths}, threads=options.threads)
    parts: dict[Path, list[tuple[float, ...]]] = {path: [] for path in options.candidates}
    for text in texts:
        goals = text.tokens[text.first + 1 :].tolist()
        walks = [
            source.logits(text.tokens, head_rows(source.vocab_size), text.first)
            for source in sources
        ]
        rows = (zip(*blocks, strict=True) for blocks in zip(*walks, strict=True))
        for (z, *others), goal in zip(chain.from_iterable(rows), goals, strict=False):
            for path, w in zip(options.candidates, others, strict=True):
                parts[path].append(_token_rounding(z.double(), w.double(), goal))
    for source in sources:
        source.close()
    return {path: Rounding(*np.array(values).T) for path, values in parts.items()}


def _token_rounding(z: torch.Tensor, w: torch.Tensor, target: int) -> tuple[float, ...]:
    """(kl, nll, Δp, top) of one token from its [V] logits."""
    log_p, log_q = z.log_softmax(0), w.log_softmax(0)
    low = max(float(z.min()), float(z.max()) + SMALLEST_STORED)
    step = (float(z.max()) - low) / 65535
    size = float(torch.maximum(z.abs().max(), w.abs().max())) + 16
    half = step / 2 + FLOAT32 * size
    p = log_p.exp()
    weight = p * (log_p - log_q).abs()
    skipped = log_p <= SMALLEST_STORED + half
    kl = float(weight[skipped].sum() + np.expm1(half) * weight[~skipped].sum())
    kl += half * np.exp(half) + FLOAT32 * size
    clipped = max(0.0, low - float(z[target]))
    nll = half + clipped
    delta_p = float(p[target]) * np.expm1(half) if not clipped else np.exp(SMALLEST_STORED)
    first, second = z.topk(2).values.tolist()
    return kl, nll, delta_p + FLOAT32, float(first - second <= 2 * half)


def _rows(table: TokenTable, rounding: Rounding) -> list[Row]:
    """What the tool prints, with so8tqc's values and the largest distance from them.

    Order statistics move by no more than the largest change of any one value.
    """
    s = summarise(table)
    nll, dp, kl = rounding.nll.mean(), rounding.delta_p, rounding.kl
    percent: Callable[[float], float] = lambda value: 100 * value  # noqa: E731
    ppl, ppl_base = s["ppl_candidate"], s["ppl_reference"]
    # float32 sums of the candidate's own log-probabilities
    own = FLOAT32 * 64
    rows = [
        Row("Mean PPL(Q)", ppl, ppl * own),
        Row("Mean PPL(base)", ppl_base, ppl_base * (np.expm1(nll) + own)),
        Row("Mean ln(PPL(Q)/PPL(base))", s["ln_ppl_ratio"], nll + own),
        Row("Mean    KLD", s["kl_mean"], kl.mean()),
        Row("Maximum KLD", s["kl_max"], kl.max()),
        *_percentile_rows("KLD", s["kl_percentiles"], kl.max(), float),
        Row("Minimum KLD", s["kl_min"], kl.max()),
        Row("Mean    Δp", 100 * s["dp_mean"], 100 * dp.mean()),
        Row("Maximum Δp", 100 * s["dp_max"], 100 * dp.max()),
        *_percentile_rows("Δp", s["dp_percentiles"], dp.max(), percent),
        Row("Minimum Δp", 100 * s["dp_min"], 100 * dp.max()),
        Row("RMS Δp", 100 * s["dp_rms"], 100 * np.sqrt(np.square(dp).mean())),
        Row("Same top p", 100 * s["top1"], 100 * rounding.top.mean()),
        Row("Cor(ln(PPL(Q)), ln(PPL(base)))", 100 * s["nll_correlation"], 0.0),
    ]
    return rows


def _percentile_rows(
    what: str, values: dict[str, float], bound: float, unit: Callable[[float], float]
) -> list[Row]:
    def label(percentile: str) -> str:
        if percentile == "50":
            return f"Median  {what}"
        return f"{float(percentile):.1f}%   {what}"

    return [Row(label(p), unit(value), unit(bound)) for p, value in values.items()]


def _show(name: str, printed: dict[str, float], rows: Sequence[Row]) -> bool:
    """Print a table; whether every distance is within the bound and the printed digits."""
    print(f"\n{name:32}{'tool':>12}{'so8tqc':>14}{'distance':>12}{'bound':>12}")
    fine = True
    for row in rows:
        theirs = printed[row.label]
        digits = 6 if "PPL" in row.label and "Cor" not in row.label else 3
        digits = 6 if "KLD" in row.label else 2 if "Cor" in row.label else digits
        bound = row.bound + 0.5 * 10.0**-digits
        distance = abs(row.ours - theirs)
        good = distance <= bound
        fine &= good
        print(f"{row.label:32}{theirs:12.{digits}f}{row.ours:14.{digits + 2}f}{distance:12.2e}"
              f"{bound:12.2e}{'' if good else '  beyond'}")  # fmt: skip
    return fine


if __name__ == "__main__":
    main()
