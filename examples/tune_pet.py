"""Search strength and boundaries of the PET penalty on a small budget; print the Pareto front.

    python examples/tune_pet.py
    python examples/tune_pet.py --base MODEL_DIR --data corpus.txt --trials 16 --steps 60

Each trial trains gates as ``train_gates.py`` does, from the same start and on the same batches, and
is judged on held-out windows by two numbers that should both be small:

* NLL: mean next-token cross-entropy, nats;
* HF: share of the hidden states' energy at periods below 4 tokens, the mean over layers of
  ``metrics.smoothness`` (without the first 4 tokens).

The first trial trains without the penalty. The others take strength (log-uniform) and the two
boundaries of the three-phase schedule from a scrambled Sobol sequence (scipy.stats.qmc), which
covers the three dimensions evenly with few points. A trial is on the front if no other is better in
one number and not worse in the other. Differences from the first trial are paired by window, ± one
standard error; a short training says which strengths are worth a long one, not how good it will be.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import qmc
from torch.nn import functional as F

from so8tqc.metrics.smoothness import HIGH, hidden_sums, share
from so8tqc.rotations.gates import attached_gates
from so8tqc.sources.inputs.builtin import DEMO_MODEL
from train_gates import load, parser, split_windows, train


class Trial(NamedTuple):
    """One training, judged on held-out windows.

    Attributes:
        strength: of the last phase.
        boundaries: fractions of training where the transition begins and ends.
        nll, high: by window: nats; share of energy.
    """

    strength: float
    boundaries: tuple[float, float]
    nll: np.ndarray
    high: np.ndarray


def arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--base", default=DEMO_MODEL, help="model directory, or builtin:NAME")
    options.add_argument("--data", type=Path, help="plain text; default: Python's topics")
    options.add_argument(
        "--trials", type=int, default=9, help="trainings, the one without included"
    )
    options.add_argument("--strengths", type=float, nargs=2, default=(0.1, 4.0),
                         help="least and largest strength")  # fmt: skip
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--window", type=int, default=128)
    options.add_argument("--held-out", type=int, default=8, help="windows to judge on")
    options.add_argument("--lr", type=float, default=3e-3)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, help="also write all trials as JSON")
    args = options.parse_args()
    if not 0 < args.strengths[0] < args.strengths[1]:
        options.error("--strengths: 0 < least < largest is needed")
    if args.data is not None and not args.data.is_file():
        options.error(f"--data {args.data}: no such file")
    if min(args.trials, args.held_out) < 2 or args.steps < 1 or args.window < 16:
        options.error("at least 2 trials, 2 windows to judge on, 1 step and a window of 16")
    return args


def settings(args: argparse.Namespace) -> list[tuple[float, tuple[float, float]]]:
    """Strength and boundaries of every trial: none first, then a Sobol sequence."""
    least, largest = np.log(args.strengths)
    sobol = qmc.Sobol(3, rng=np.random.default_rng(args.seed))
    points = sobol.random_base2(int(np.ceil(np.log2(max(2, args.trials - 1)))))[: args.trials - 1]
    chosen = [(0.0, (0.3, 0.7))]
    for u, v, w in points:
        begin = 0.6 * v
        end = begin + 0.1 + (0.9 - begin) * w
        chosen.append((float(np.exp(least + u * (largest - least))), (begin, end)))
    return chosen


@torch.no_grad()
def judge(model: object, data: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """NLL and high-frequency share of each held-out window."""
    nll, high = [], []
    for row in data:
        output = model(input_ids=row[None, :-1], output_hidden_states=True, use_cache=False)
        nll.append(F.cross_entropy(output.logits[0], row[1:]).item())
        sums = np.stack([hidden_sums(h[0]) for h in output.hidden_states[1:]])
        high.append(share(sums, HIGH).mean())
    return np.array(nll), np.array(high)


def front(trials: list[Trial]) -> list[Trial]:
    """The trials that no other beats, by NLL."""
    points = [(trial.nll.mean(), trial.high.mean()) for trial in trials]
    best = [
        trial
        for trial, (nll, high) in zip(trials, points, strict=True)
        if not any(a <= nll and b <= high and (a, b) != (nll, high) for a, b in points)
    ]
    return sorted(best, key=lambda trial: trial.nll.mean())


def line(trial: Trial, first: Trial) -> str:
    begin, end = trial.boundaries
    name = f"{trial.strength:.2f} from {begin:.2f} to {end:.2f}" if trial.strength else "no penalty"
    return (f"{name:<26} NLL {trial.nll.mean():.4f} ({difference(trial.nll, first.nll)})"
            f"  HF {trial.high.mean():.4f} ({difference(trial.high, first.high)})")  # fmt: skip


def difference(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Paired by window: mean ± standard error."""
    d = ours - theirs
    return f"{d.mean():+.4f} ± {d.std(ddof=1) / np.sqrt(d.size):.4f}"


def main() -> None:
    args = arguments()
    model, tokenizer = load(args.base)
    training, held_out = split_windows(args.data, tokenizer, args.window, args.held_out)
    if len(held_out) < 2 or len(training) < args.batch:
        raise SystemExit("not enough text: give more, or a smaller --window")

    trials: list[Trial] = []
    for strength, boundaries in settings(args):
        options = parser().parse_args([
            "--out", "unused", "--pet", str(strength), "--steps", str(args.steps),
            "--batch", str(args.batch), "--lr", str(args.lr), "--seed", str(args.seed),
            "--boundaries", *map(str, boundaries),
        ])  # fmt: skip
        with attached_gates(model, seed=args.seed) as gates:
            train(model, gates, training, options)
            trials.append(Trial(strength, boundaries, *judge(model, held_out)))
        print(f"trial {len(trials)}: {line(trials[-1], trials[0])}\n", flush=True)

    nll, high = judge(model, held_out)
    print(f"base model: NLL {nll.mean():.4f}  HF {high.mean():.4f}")
    print("Pareto front (differences from the trial without the penalty):")
    for trial in front(trials):
        print("  " + line(trial, trials[0]))
    if args.out is not None:
        rows = [
            {"strength": t.strength, "boundaries": t.boundaries, "nll": t.nll.tolist(),
             "high_frequency": t.high.tolist()}
            for t in trials
        ]  # fmt: skip
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
