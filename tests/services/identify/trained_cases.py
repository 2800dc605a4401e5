"""Gates trained a few steps on a tiny model, each by a reading drawn at random.

The gates are modules of this file alone: parametrizations in float32 by torch's own operations, as
trainings write them, so that nothing of what is tested made the cases. The checkpoint says none of
its facts: flat keys ``model.layers.N.rotation_gate.theta``.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

VOCABULARY, WIDTH, LAYERS, WINDOW = 512, 64, 3, 64
ROOT = Path(__file__).parents[3]

Rotation = Callable[[torch.Tensor], torch.Tensor]


def exp(theta: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_exp(theta - theta.mT)


def cayley(theta: torch.Tensor) -> torch.Tensor:
    a, one = theta - theta.mT, torch.eye(8)
    return torch.linalg.solve(one - a / 2, one + a / 2)


def taylor(b: torch.Tensor, terms: int) -> torch.Tensor:
    term = result = torch.eye(8).expand_as(b)
    for k in range(1, terms + 1):
        term = term @ b / k
        result = result + term
    return result


def legacy_taylor(theta: torch.Tensor) -> torch.Tensor:
    a = theta - theta.mT + 1e-6 * torch.eye(8)
    s = a.norm(dim=(1, 2), keepdim=True).clamp(max=1.0)
    r = taylor(a / (s + 1e-8), 10)
    return r @ r if bool((s >= 1).any()) else r


def scaled_taylor(theta: torch.Tensor) -> torch.Tensor:
    a = theta - theta.mT
    s = torch.log2(a.norm(dim=(1, 2), keepdim=True) + 1e-7).ceil().clamp(min=0)
    r = taylor(a / (2**s + 1e-7), 12)
    for _ in range(int(s.max())):
        r = r @ r
    return r


ROTATIONS: dict[str, Rotation] = {
    "exp": exp,
    "cayley": cayley,
    "legacy-taylor": legacy_taylor,
    "scaled-taylor": scaled_taylor,
}


@dataclass(frozen=True)
class Case:
    """A trained checkpoint and what is true of it.

    Attributes:
        file: the checkpoint.
        text: what it was trained on.
        parametrization, convention, site: the truth.
        steps: of the training.
        before, after: NLL of the training's own batches without and with gates, nats.
    """

    file: Path
    text: Path
    parametrization: str
    convention: str
    site: str
    steps: int
    before: float
    after: float

    @property
    def truth(self) -> str:
        return f"{self.parametrization}, {self.convention}, {self.site}"


def topics() -> list[str]:
    """The language reference that comes with every Python."""
    from pydoc_data.topics import topics as known

    return [known[name] for name in sorted(known)]


def make_base(directory: Path, tokenizer_files: Path, steps: int, seed: int = 0) -> Path:
    """A tiny Llama; with ``steps`` trained so long on English prose."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
    shutil.copytree(tokenizer_files, directory)
    if steps:
        prose = [
            json.loads((ROOT / "data" / name).read_text(encoding="utf-8"))["texts"]
            for name in ("longtext_en.json", "validation_en.json")
        ]
        data = tokens([text for texts in prose for text in texts], directory)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        draw = random.Random(seed)
        for _ in range(steps):
            loss = nll(model, data[draw.sample(range(len(data)), 8)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(str(directory))
    return directory


def tokens(texts: list[str], tokenizer_files: Path) -> torch.Tensor:
    """[n, WINDOW] token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_files))
    ids = tokenizer("\n\n".join(texts), verbose=False)["input_ids"]
    count = len(ids) // WINDOW
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


def nll(model: Any, batch: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@contextmanager
def gated(
    model: Any, thetas: list[torch.Tensor], make: Rotation, row: bool, site: str
) -> Iterator[None]:
    def turn(x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        r = make(theta)
        blocks = x.unflatten(-1, (-1, 8)).unsqueeze(-2)  # [..., N, 1, 8], rows
        return (blocks @ (r if row else r.mT)).squeeze(-2).flatten(-2)

    handles = []
    for layer, theta in zip(model.model.layers, thetas, strict=True):
        o_proj = layer.self_attn.o_proj
        if site == "input":
            hook = lambda _m, args, theta=theta: (turn(args[0], theta),)  # noqa: E731
            handles.append(o_proj.register_forward_pre_hook(hook))
        else:
            hook = lambda _m, _a, out, theta=theta: turn(out, theta)  # noqa: E731
            handles.append(o_proj.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def train_case(base: Path, directory: Path, seed: int, texts: list[str]) -> Case | None:
    """A case with everything about it drawn from a seed; None if its gates do not lower the NLL."""
    from transformers import LlamaForCausalLM

    draw = random.Random(seed)
    parametrization = draw.choice(list(ROTATIONS))
    row, site = draw.random() < 0.5, draw.choice(["input", "output"])
    steps, lr = draw.choice([3, 6, 12, 25, 50]), 10 ** draw.uniform(-2.5, -1.2)
    std = 10 ** draw.uniform(-3, -1.3)
    chosen = draw.sample(texts, min(len(texts), 12))
    directory.mkdir(parents=True, exist_ok=True)
    text = directory / f"text-{seed}.txt"
    text.write_text("\n\n".join(chosen)[:16_000], encoding="utf-8")
    data = tokens([text.read_text(encoding="utf-8")], base)
    model = LlamaForCausalLM.from_pretrained(str(base), dtype=torch.float32).eval()
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    thetas = [
        (torch.randn(WIDTH // 8, 8, 8, generator=generator) * std).requires_grad_()
        for _ in range(LAYERS)
    ]
    make = ROTATIONS[parametrization]
    before = nll(model, data).item()
    optimizer = torch.optim.Adam(thetas, lr=lr)
    with gated(model, thetas, make, row, site):
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss = nll(model, data[draw.sample(range(len(data)), min(8, len(data)))])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            after = nll(model, data).item()
    if after >= before:
        return None
    file = directory / f"case-{seed}.pt"
    saved = {f"model.layers.{i}.rotation_gate.theta": t.detach() for i, t in enumerate(thetas)}
    torch.save(saved, file)
    return Case(file, text, parametrization, "row" if row else "column", site, steps, before, after)


def record_capture(base: Path, case: Case, path: Path, texts: int = 8) -> Path:
    """The training's own float32 logits of the first windows of its text."""
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(str(base), dtype=torch.float32).eval()
    thetas = list(torch.load(case.file, weights_only=True).values())
    data = tokens([case.text.read_text(encoding="utf-8")], base)[:texts]
    tensors = {}
    make, row = ROTATIONS[case.parametrization], case.convention == "row"
    with torch.inference_mode(), gated(model, thetas, make, row, case.site):
        for i, ids in enumerate(data):
            tensors[f"tokens.{i}"] = ids.clone()
            tensors[f"logits.{i}"] = model(ids[None]).logits[0].clone()
    save_file(tensors, str(path), metadata={"so8t.capture_version": "1"})
    return path
