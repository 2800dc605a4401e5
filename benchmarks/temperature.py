"""One pass for every temperature, against fitting on stored logits.

Three claims of `so8tqc calibrate`, each with the number it is measured against in the same run:

1. time: the pass that serves every temperature, with a fit by NLL, against netcal's
   TemperatureScaling on stored logits (with the extra `peers`) and LBFGS on them, V = 49,152;
   target 5 × against netcal;
2. accuracy: the fitted T against the optimum of the full stored logits, V = 262,144; limit 1e-3;
3. memory: the pass adds at most 512 MiB to the process, V = 262,144 (about 1.5 kB of them a token).

    python benchmarks/temperature.py [--tokens 512] [--large-tokens 512]
    python benchmarks/temperature.py --gguf FILE --tokenizer DIR [--data builtin:validation]

The second form takes a real model instead: its logits over the texts that `so8tqc calibrate` holds
out are stored in memory (4·V bytes a token), and every method fits the same ones. The temperatures
may differ by 1e-3 from the optimum in float64.

Else the source is synthetic, made block by block from a seed, so that no model's own memory or time
is in the numbers: z = 2.5·normal, the next token drawn from softmax(z / 1.3). What a method has to
pay for is counted alike: ours for its pass over the logits, the others for theirs, both without
making them. Seconds are CPU seconds of one thread, which other work on the machine changes little.
Linux only (/proc).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from process_memory import peak_bytes
from so8tqc.metrics.temperature.fit import fit_temperature
from so8tqc.metrics.temperature.measures import BRIER, CONFIDENCE_VARIANCE, NLL, adaptive_ece, ece
from so8tqc.services.calibrate.holdout import split_texts
from so8tqc.sources.gguf import GGUFSource
from so8tqc.sources.inputs.texts import encode, load_texts, load_tokenizer
from so8tqc.sources.protocol import EncodedText, TokenIds
from so8tqc.sources.temperatures import walk_temperatures
from temperature_peers import exact, lbfgs, lbfgs_fixed_rate, netcal

BOUNDS = (0.5, 3.0)
TRUE = 1.3
SMALL, LARGE = 49_152, 262_144
TEXT = 64
LIMIT = 512 << 20
NETCAL = "netcal on stored logits"
PEERS = {
    "LBFGS on stored logits": lbfgs,
    "LBFGS at rate 0.01, 50 steps": lbfgs_fixed_rate,
    NETCAL: netcal,
}
NEAR = 1e-3


@dataclass
class Synthetic:
    """Logits of a text from a seed in its first token; the same on every pass."""

    vocab_size: int
    name: str = "synthetic"
    making: float = 0.0  # seconds spent on making logits

    def logits(self, tokens: TokenIds, rows: int, first: int = 0) -> Iterator[torch.Tensor]:
        generator = np.random.default_rng(int(tokens[0]))
        for start in range(first, tokens.size, rows):
            began = time.process_time()
            shape = (min(rows, tokens.size - start), self.vocab_size)
            block = generator.standard_normal(shape, dtype=np.float32)
            block *= np.float32(2.5)
            self.making += time.process_time() - began
            yield torch.from_numpy(block)

    def close(self) -> None:
        pass


class Stored:
    """Logits of texts, kept in memory.

    Attributes:
        z: [n, V] float32, text after text, no last positions.
        y: [n] the tokens that follow.
    """

    making = 0.0

    def __init__(self, source: Synthetic | GGUFSource, texts: list[EncodedText]) -> None:
        self.vocab_size, self.name = source.vocab_size, source.name
        self.z = torch.empty(sum(text.tokens.size - 1 for text in texts), source.vocab_size)
        self.y = torch.from_numpy(np.concatenate([text.tokens[1:] for text in texts]))
        self._rows: dict[bytes, slice] = {}
        row = 0
        for text in texts:
            self._rows[text.tokens.tobytes()] = slice(row, row + text.tokens.size - 1)
            for block in source.logits(text.tokens[:-1], 128):
                self.z[row : row + block.shape[0]] = block
                row += block.shape[0]

    def logits(self, tokens: TokenIds, rows: int, first: int = 0) -> Iterator[torch.Tensor]:
        yield from self.z[self._rows[tokens.tobytes()]][first:].split(rows)

    def close(self) -> None:
        pass


def texts_of(source: Synthetic, tokens: int) -> list[EncodedText]:
    """Texts whose every next token is drawn from softmax(z / TRUE), by the Gumbel trick."""
    texts = []
    for seed in range(tokens // TEXT):
        generator = np.random.default_rng([seed, 1])
        ids = np.full(TEXT + 1, seed, dtype=np.int64)
        row = 0
        for block in source.logits(ids, 16):
            for z in block.numpy()[: TEXT - row]:
                gumbel = generator.gumbel(size=z.size).astype(np.float32)
                ids[row + 1] = int((z / TRUE + gumbel).argmax())
                row += 1
        texts.append(EncodedText(f"t{seed}", ids))
    return texts


@dataclass(frozen=True)
class Ours:
    """T by NLL; seconds of the pass with that fit, of four more objectives, of making logits."""

    temperature: float
    one: float
    more: float
    making: float


def ours(source: Synthetic | Stored, texts: list[EncodedText]) -> Ours:
    source.making, began = 0.0, time.process_time()
    table = walk_temperatures(source, texts, BOUNDS)
    fit = fit_temperature(table, NLL, resamples=200, seed=0)
    one = time.process_time() - began - source.making
    began = time.process_time()
    for measure in (BRIER, ece(15), adaptive_ece(15), CONFIDENCE_VARIANCE):
        fit_temperature(table, measure, resamples=200, seed=0)
    return Ours(fit.temperature, one, time.process_time() - began, source.making)


def speed(tokens: int) -> bool:
    source = Synthetic(SMALL)
    texts = texts_of(source, tokens)
    ours(source, texts[:1])  # imports are nobody's cost
    result = ours(source, texts)
    n = sum(text.tokens.size - 1 for text in texts)
    print(f"V = {SMALL:,}, {n:,} tokens (making them takes {result.making:.1f} s, not counted)")
    print(
        f"  so8tqc, one pass, NLL            T = {result.temperature:.4f}  {result.one:7.1f} s"
        f"  (four more objectives: {result.more:.1f} s)"
    )
    stored = Stored(source, texts)
    ratios = {}
    for name, fit in PEERS.items():
        peer = fit(stored.z, stored.y)
        if peer is None:
            print(f"  {name:32} not installed")
            continue
        ratios[name] = peer[1] / result.one
        print(f"  {name:32} T = {peer[0]:.4f}  {peer[1]:7.1f} s  {ratios[name]:5.1f} ×")
    return ratios.get(NETCAL, 5.0) >= 5.0


def real(options: argparse.Namespace) -> bool:
    """Every method on the same stored logits of a GGUF file."""
    tokenizer = load_tokenizer(options.tokenizer)
    every = encode(load_texts(options.data), tokenizer, options.max_tokens)
    texts = [every[i] for i in split_texts(every, 0.5, 0).holdout]
    source = GGUFSource(options.gguf, options.gguf.name, context=options.max_tokens)
    began = time.perf_counter()
    stored = Stored(source, texts)
    making = time.perf_counter() - began
    source.close()
    z, y = stored.z, stored.y
    print(f"{source.name}: V = {z.shape[1]:,}, {z.shape[0]:,} tokens of {len(texts)} texts "
          f"({4 * z.numel() / 2**20:,.0f} MiB of logits; making them takes "
          f"{making:.0f} s, not counted)", flush=True)  # fmt: skip
    ours(stored, texts[:1])  # imports are nobody's cost
    result = ours(stored, texts)
    optimum = exact(z, y)
    print(f"  optimum of the stored logits in float64                T = {optimum:.6f}")
    near = [_row("so8tqc, one pass", (result.temperature, result.one), optimum, result.one)]
    for name, fit in PEERS.items():
        peer = fit(z, y)
        if peer is None:
            print(f"  {name:32} not installed")
            continue
        close = _row(name, peer, optimum, result.one)
        if fit is not lbfgs_fixed_rate:
            near.append(close)
    return all(near)


def _row(name: str, peer: tuple[float, float], optimum: float, seconds: float) -> bool:
    """Print a fit; whether it is at the optimum."""
    print(f"  {name:32} T = {peer[0]:.6f}  {peer[0] - optimum:+.1e}  {peer[1]:7.1f} s"
          f"  {peer[1] / seconds:6.2f} ×", flush=True)  # fmt: skip
    return abs(peer[0] - optimum) <= NEAR


def memory(tokens: int) -> dict[str, float]:
    """In a process of its own: what the pass adds to the peak, bytes."""
    source = Synthetic(LARGE)
    texts = texts_of(source, tokens)
    before = psutil.Process().memory_info().rss
    result = ours(source, texts)
    return {"T": result.temperature, "added": peak_bytes() - before}


def large(tokens: int) -> bool:
    done = subprocess.run(
        [sys.executable, __file__, "--memory", "--large-tokens", str(tokens)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])
    source = Synthetic(LARGE)
    texts = texts_of(source, tokens)
    stored = Stored(source, texts)
    optimum = exact(stored.z, stored.y)
    apart = abs(result["T"] - optimum)
    print(f"V = {LARGE:,}, {sum(text.tokens.size - 1 for text in texts):,} tokens")
    print(f"  fitted T = {result['T']:.6f}, optimum of full logits = {optimum:.6f}: "
          f"{apart:.1e} apart, limit 1e-3")  # fmt: skip
    print(f"  the pass adds {result['added'] / 2**20:.0f} MiB to the peak, limit "
          f"{LIMIT >> 20} MiB; all logits would be "
          f"{4 * LARGE * tokens / 2**20:,.0f} MiB")  # fmt: skip
    return apart <= NEAR and result["added"] <= LIMIT


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--large-tokens", type=int, default=512)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="model directory, with --gguf")
    parser.add_argument("--data", action="append")
    parser.add_argument("--max-tokens", type=int, default=256, help="of each text, with --gguf")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.data = options.data or ["builtin:validation"]
    if (options.gguf is None) != (options.tokenizer is None):
        parser.error("--gguf and --tokenizer go together")
    torch.set_num_threads(1)
    if options.memory:
        print(json.dumps(memory(options.large_tokens)))
        return 0
    met = (
        [real(options)]
        if options.gguf is not None
        else [speed(options.tokens), large(options.large_tokens)]
    )
    print("targets met" if all(met) else "a target was missed")
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
