"""Train rotation gates on a frozen transformers model, with or without the PET penalty.

    python examples/train_gates.py --out gates.safetensors --pet 0.5
    python examples/train_gates.py --base MODEL_DIR --data corpus.txt --out gates.safetensors

Loss: next-token cross-entropy plus weight(t) · mean over layers of the relative
second-difference energy of the hidden states (see ``so8tqc.rotations.pet``). Only the
gates are trained. Without --data the text is the language reference that comes with
every Python (``pydoc_data.topics``), split by topic into training and held-out text.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.gates import RotationGate, attached_gates
from so8tqc.rotations.pet import (
    Schedule,
    ThreePhaseSchedule,
    WarmupAnnealSchedule,
    pet_penalty,
)
from so8tqc.rotations.rotation_set import Target
from so8tqc.sources.inputs.builtin import DEMO_MODEL, resolve_model
from so8tqc.sources.inputs.texts import load_tokenizer


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default=DEMO_MODEL, help="model directory, or builtin:NAME")
    parser.add_argument("--data", type=Path, help="plain text (UTF-8); documents "
                        "are separated by two blank lines; default: Python's topics")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="gate file to write")
    parser.add_argument("--pet", type=float, default=0.0, help="strength of the last phase")
    parser.add_argument("--pet-kind", choices=["l2", "huber"], default="l2")
    parser.add_argument("--schedule", choices=["three-phase", "warmup-anneal"],
                        default="three-phase")  # fmt: skip
    parser.add_argument("--exploration", type=float, default=0.1,
                        help="first phase's share of --pet")  # fmt: skip
    parser.add_argument("--boundaries", type=float, nargs=2,
                        help="fractions of training; default: the schedule's own")  # fmt: skip
    parser.add_argument("--parametrization", choices=["exp", "cayley"], default="exp")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def arguments() -> argparse.Namespace:
    options = parser()
    args = options.parse_args()
    if args.data is not None and not args.data.is_file():
        options.error(f"--data {args.data}: no such file")
    if args.window < 3:
        options.error("--window must be at least 3: PET needs a second difference")
    if min(args.batch, args.steps) < 1:
        options.error("--batch and --steps must be at least 1")
    try:
        schedule_of(args)
    except ValueError as error:
        options.error(str(error))
    return args


def documents(path: Path | None) -> list[str]:
    """Texts to train on and to hold out.

    A file with fewer than ten documents is taken paragraph by paragraph instead, so that
    one long text can be split too.
    """
    if path is not None:
        text = path.read_text(encoding="utf-8")
        for separator in ("\n\n\n", "\n\n"):
            parts = [part for part in text.split(separator) if part.strip()]
            if len(parts) >= 10:
                break
        return parts
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def windows(texts: list[str], tokenizer: object, length: int) -> torch.Tensor:
    """All texts, joined by the end token, cut into [n, length + 1] token ids."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
    count = len(ids) // (length + 1)
    return torch.tensor(ids[: count * (length + 1)]).view(count, length + 1)


def load(base: str) -> tuple[object, object]:
    """The model in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM

    directory = resolve_model(base)
    model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32)
    return model.eval(), load_tokenizer(directory)


def split_windows(
    path: Path | None, tokenizer: object, length: int, held_out: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Training windows, and at most ``held_out`` others from a tenth of the documents."""
    texts = documents(path)
    random.Random(1234).shuffle(texts)
    tenth = max(1, len(texts) // 10)
    rest = windows(texts[:tenth], tokenizer, length)[:held_out]
    return windows(texts[tenth:], tokenizer, length), rest


def batches(data: torch.Tensor, size: int, rng: random.Random) -> Iterator[torch.Tensor]:
    """Endless shuffled batches."""
    while True:
        order = list(range(len(data)))
        rng.shuffle(order)
        for i in range(0, len(order) - size + 1, size):
            yield data[order[i : i + size]]


def schedule_of(args: argparse.Namespace) -> ThreePhaseSchedule | WarmupAnnealSchedule:
    own = {"boundaries": tuple(args.boundaries)} if args.boundaries else {}
    if args.schedule == "three-phase":
        return ThreePhaseSchedule(
            exploration=args.pet * args.exploration,
            stabilisation=args.pet,
            **own,
        )
    return WarmupAnnealSchedule(peak=args.pet, **own)


def train(
    model: object, gates: dict[int, RotationGate], data: torch.Tensor, args: argparse.Namespace
) -> tuple[float, float]:
    """Run the loop; return the last ten steps' mean cross-entropy and penalty."""
    schedule: Schedule = schedule_of(args)
    parameters = [gate.theta for gate in gates.values()]
    optimizer = torch.optim.Adam(parameters, lr=args.lr)
    stream = batches(data, args.batch, random.Random(args.seed))
    history: list[tuple[float, float]] = []
    started = time.monotonic()
    for step in range(args.steps):
        fraction = step / max(1, args.steps - 1)
        optimizer.param_groups[0]["lr"] = args.lr * 0.5 * (1 + math.cos(math.pi * fraction))
        batch = next(stream)
        output = model(input_ids=batch[:, :-1], output_hidden_states=True, use_cache=False)
        loss = F.cross_entropy(output.logits.flatten(0, 1), batch[:, 1:].flatten())
        # hidden_states[0] is the embedding, which no gate can change
        penalty = torch.stack(
            [pet_penalty(h, kind=args.pet_kind) for h in output.hidden_states[1:]]
        ).mean()
        total = loss + schedule.weight(fraction) * penalty
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append((loss.item(), penalty.item()))
        if step % 10 == 9 or step == 0:
            rate = (time.monotonic() - started) / (step + 1)
            losses = f"nll {loss.item():.3f}  penalty {penalty.item():.3f}"
            weight = schedule.weight(fraction)
            print(f"step {step + 1:4d}  {losses}  weight {weight:.3f}  {rate:.1f} s", flush=True)
    last = np.array(history[-10:]).mean(axis=0)
    return float(last[0]), float(last[1])


@torch.no_grad()
def evaluate(model: object, data: torch.Tensor) -> tuple[float, float, torch.Tensor]:
    """Held-out NLL, last-layer second-difference energy, and log-probabilities [n, T, V]."""
    nll, energy, logs = [], [], []
    for row in data:
        output = model(input_ids=row[None, :-1], output_hidden_states=True, use_cache=False)
        log = output.logits[0].log_softmax(-1)
        nll.append(F.nll_loss(log, row[1:]).item())
        energy.append(pet_penalty(output.hidden_states[-1]).item())
        logs.append(log)
    return float(np.mean(nll)), float(np.mean(energy)), torch.stack(logs)


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    model, tokenizer = load(args.base)
    training, held_out = split_windows(args.data, tokenizer, args.window, 8)
    print(f"{len(training)} training windows, {len(held_out)} held out, {args.window} tokens each")
    if not len(held_out) or len(training) < args.batch:
        raise SystemExit(
            f"{args.data or 'Python topics'}: not enough text; one held-out window and "
            f"{args.batch} to train on are needed. Give more text, more paragraphs, or a "
            "smaller --window."
        )

    base_nll, base_energy, base_log = evaluate(model, held_out)
    parametrization = Parametrization(args.parametrization)
    with attached_gates(model, parametrization=parametrization, seed=args.seed) as gates:
        final_nll, final_penalty = train(model, gates, training, args)
        gated_nll, gated_energy, gated_log = evaluate(model, held_out)
        theta = {Target(i): skew(gate.theta) for i, gate in gates.items()}
    kl = (base_log.exp() * (base_log - gated_log)).sum(-1).mean().item()

    results = {
        "heldout_nll_base": round(base_nll, 4),
        "heldout_nll_gated": round(gated_nll, 4),
        "heldout_kl_base_to_gated": round(kl, 4),
        "second_difference_energy_base": round(base_energy, 4),
        "second_difference_energy_gated": round(gated_energy, 4),
        "final_train_nll": round(final_nll, 4),
        "final_penalty": round(final_penalty, 4),
    }
    pet = None
    if args.pet > 0:
        pet = {
            "kind": args.pet_kind,
            "schedule": args.schedule,
            "strength": args.pet,
            **({"exploration_share": args.exploration} if args.schedule == "three-phase" else {}),
            "boundaries": list(schedule_of(args).boundaries),
            "steps": args.steps,
            "seed": args.seed,
            **results,
        }
    write_native(
        args.out,
        theta,
        parametrization=parametrization,
        convention=Convention.COLUMN,
        site=Site.INPUT,
        pet=pet,
        metadata={"so8t.training": json.dumps(results)},
    )
    print(json.dumps(results, indent=2))
    print(f"wrote {args.out}")


def skew(theta: torch.Tensor) -> np.ndarray:
    """The part of theta that matters, as one strict upper triangle: A = θ' − θ'ᵀ is unchanged."""
    a = (theta - theta.transpose(1, 2)).detach()
    return torch.triu(a, 1).contiguous().numpy()


if __name__ == "__main__":
    main()
