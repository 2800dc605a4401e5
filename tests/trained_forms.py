"""What trainings save, made anew: each form of file, and the forward of the training that wrote it.

The forward is the oracle: a transformers model in float64 whose modules are wrapped by hooks that
apply R as the training's module does, from formulas restated here in torch.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TOKENS = torch.tensor([[1, *((5 * i * i + 11 * i) % 480 + 3 for i in range(40))]])

State = dict[str, Tensor]


def thetas(layers: int = 3, blocks: int = 8, scale: float = 0.15, seed: int = 0) -> list[Tensor]:
    """[N, 8, 8] float32 for each layer, the last of them larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(blocks, 8, 8, generator=generator) * scale * (1 + i) for i in range(layers)]


def rotation(theta: Tensor, parametrization: str) -> Tensor:
    """R of every block as the training computes it, in float64."""
    a = theta.double() - theta.double().transpose(1, 2)
    eye = torch.eye(a.shape[1], dtype=torch.float64)
    if parametrization == "exp":
        return torch.linalg.matrix_exp(a)
    if parametrization == "cayley":
        return torch.linalg.solve(eye - a / 2, eye + a / 2)
    norms = a.flatten(1).norm(dim=1)
    if parametrization == "scaled-taylor":
        powers = [max(0, math.ceil(math.log2(float(n) + 1e-7))) for n in norms]
        scaled = torch.stack([b / (2**s + 1e-7) for b, s in zip(a, powers, strict=True)])
        r = _taylor(scaled, 12)
        for _ in range(max(powers)):
            r = r @ r
        return r
    assert parametrization == "legacy-taylor"
    a = a + 1e-6 * eye
    s = a.flatten(1).norm(dim=1).clamp(max=1)[:, None, None]
    r = _taylor(a / (s + 1e-8), 10)
    return r @ r if bool((s >= 1).any()) else r


def _taylor(b: Tensor, terms: int) -> Tensor:
    return sum(
        (torch.linalg.matrix_power(b, k) / math.factorial(k) for k in range(terms + 1)),
        torch.zeros_like(b),
    )


def turned(x: Tensor, r: Tensor, convention: str) -> Tensor:
    """x_row·R, or R·x, on blocks of the last axis."""
    rows = x.unflatten(-1, (r.shape[0], r.shape[1]))
    how = "...nj,nji->...ni" if convention == "row" else "...nj,nij->...ni"
    return torch.einsum(how, rows, r).flatten(-2)


def trained_logits(
    base: Path,
    rotations: list[Tensor],
    *,
    convention: str,
    site: str,
    weights: Mapping[str, Tensor] | None = None,
    module: str = "self_attn.o_proj",
) -> Tensor:
    """[T, V] float64 logits of base and gates, ``weights`` in place of the base's own."""
    model = loaded(base)
    for name, value in (weights or {}).items():
        model.get_parameter(name).data = value.double()
    for layer, r in zip(model.model.layers, rotations, strict=True):
        hook(layer.get_submodule(module), r, convention, site)
    return logits(model)


def hook(module: Any, r: Tensor, convention: str, site: str) -> None:
    """Put a gate in front of a module, or behind it."""
    if site == "input":
        module.register_forward_pre_hook(lambda _, args: (turned(args[0], r, convention),))
    else:
        module.register_forward_hook(lambda _, __, out: turned(out, r, convention))


def loaded(directory: Path) -> Any:
    """A model directory in float64."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float64).eval()


def logits(model: Any) -> Tensor:
    """[T, V] of the fixed tokens."""
    with torch.inference_mode():
        found: Tensor = model(TOKENS).logits[0]
    return found


def divergence(reference: Tensor, candidate: Tensor) -> float:
    """Mean KL(reference ‖ candidate), nats."""
    p, q = reference.log_softmax(-1), candidate.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def base_state(base: Path) -> State:
    """The base's weights, tied heads twice as torch saves them."""
    state: State = {}
    for file in sorted(base.glob("*.safetensors")):
        state |= load_file(str(file))
    return state


def wrapped_state(
    base: Path, gates: list[Tensor], *, level: str = "base_attention", gate: str = "rotation_gate"
) -> State:
    """A whole model whose attention is wrapped: the level, and the gate beside it."""
    state = {
        name.replace(".self_attn.", f".self_attn.{level}."): value
        for name, value in base_state(base).items()
    }
    state |= {f"model.layers.{i}.self_attn.{gate}.theta": g for i, g in enumerate(gates)}
    return state


def trained_directory(
    out: Path,
    base: Path,
    state: State,
    *,
    kind: str = "safetensors",
    shards: int = 1,
    config: Mapping[str, object] | None = None,
) -> Path:
    """A model directory as a trainer saves it: weights with their index, config, tokenizer."""
    out.mkdir(parents=True)
    for file in base.iterdir():
        if file.suffix not in (".safetensors",) and not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)
    told = json.loads((base / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(told | dict(config or {})))
    (out / "so8t_info.json").write_text("{}")
    stem = "model" if kind == "safetensors" else "pytorch_model"
    ending = "safetensors" if kind == "safetensors" else "bin"
    parts: list[State] = [{} for _ in range(shards)]
    for i, (name, value) in enumerate(state.items()):
        parts[i % shards][name] = value.contiguous()
    weight_map = {}
    for i, part in enumerate(parts):
        tail = "" if shards == 1 else f"-{i + 1:05d}-of-{shards:05d}"
        name = f"{stem}{tail}.{ending}"
        if kind == "safetensors":
            save_file(part, str(out / name), metadata={"format": "pt"})
        else:
            torch.save(part, out / name)
        weight_map |= dict.fromkeys(part, name)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (out / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return out


def lora_halves(
    shapes: Mapping[str, tuple[int, int]], rank: int = 4, seed: int = 5
) -> dict[str, tuple[Tensor, Tensor]]:
    """module → (A [r, in], B [out, r]), both of some size."""
    generator = torch.Generator().manual_seed(seed)
    return {
        module: (
            torch.randn(rank, inside, generator=generator) * 0.2,
            torch.randn(outside, rank, generator=generator) * 0.2,
        )
        for module, (outside, inside) in shapes.items()
    }


def with_lora(
    state: State, halves: Mapping[str, tuple[Tensor, Tensor]], scale: float
) -> dict[str, Tensor]:
    """name → W + s·B·A in float64."""
    return {
        f"{module}.weight": state[f"{module}.weight"].double() + scale * b.double() @ a.double()
        for module, (a, b) in halves.items()
    }


Saver = Callable[[Path, State], None]
