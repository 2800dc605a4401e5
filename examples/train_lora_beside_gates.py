"""Train a LoRA and rotation gates together on a frozen transformers model; save both.

    python examples/train_lora_beside_gates.py --out trained/
    so8tqc bake builtin-model/ trained/gates.safetensors --adapter trained/lora --out baked/

The gates are in front of PEFT's layers, so that base and branch both get the rotated input: what is
trained is (W + s·B·A)·R. Needs the extra ``adapters``.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.gates import attached_gates
from so8tqc.rotations.rotation_set import Target
from so8tqc.sources.inputs.builtin import DEMO_MODEL
from train_gates import batches, load, split_windows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default=DEMO_MODEL, help="model directory, or builtin:NAME")
    parser.add_argument("--data", type=Path, help="plain text; default: Python's topics")
    parser.add_argument("--out", type=Path, required=True, help="folder for gates and adapter")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def loss_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy of [n, length + 1] token ids, nats."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    model, tokenizer = load(args.base)
    data, held_out = split_windows(args.data, tokenizer, args.window, 4)
    config = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank,
        target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
    )  # fmt: skip
    adapted = get_peft_model(model, config)
    branches = [p for n, p in adapted.named_parameters() if "lora_" in n]
    with torch.no_grad():
        before = float(loss_of(adapted, held_out))
    with attached_gates(model, seed=args.seed) as gates:
        trained = [*branches, *(gate.theta for gate in gates.values())]
        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(trained, lr=args.lr)
        started = time.perf_counter()
        source = batches(data, args.batch, random.Random(args.seed))
        for step in range(args.steps):
            loss = loss_of(adapted, next(source))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"step {step + 1}: {float(loss):.4f} nats", flush=True)
        with torch.no_grad():
            after = float(loss_of(adapted, held_out))
        thetas = {Target(i): gate.theta.detach().double().numpy() for i, gate in gates.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    write_native(
        args.out / "gates.safetensors", thetas, parametrization=Parametrization.EXP,
        convention=Convention.COLUMN, site=Site.INPUT, pet=None,
    )  # fmt: skip
    adapted.save_pretrained(str(args.out / "lora"))
    seconds = time.perf_counter() - started
    print(
        f"held-out loss {before:.4f} before, {after:.4f} after {args.steps} steps, {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
