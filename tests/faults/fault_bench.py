"""The bench on which correct bakes are broken: a baked directory, and what it was baked from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from so8tqc.rotations.enums import Parametrization
from so8tqc.rotations.options import RotationOptions
from so8tqc.rotations.read import read_rotations
from so8tqc.rotations.rotation_set import FloatArray, RotationSet, Target

O_PROJ = "model.layers.{}.self_attn.o_proj.weight"
Q_PROJ = "model.layers.{}.self_attn.q_proj.weight"
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Bench:
    """One correct bake, copied, to be broken by hand in float64.

    Attributes:
        base: the model directory before the bake (shared: never written).
        gates: the gate file.
        out: a copy of the correct bake, which a fault changes.
        gguf: makes a GGUF of a model directory (cached), named after its key.
    """

    base: Path
    gates: Path
    out: Path
    gguf: Callable[[Path], Path] | None = None

    @cached_property
    def rotations(self) -> RotationSet:
        return read_rotations(self.gates)

    @cached_property
    def layers(self) -> range:
        return range(len(self.rotations.layers))

    @cached_property
    def base_weights(self) -> dict[str, torch.Tensor]:
        return load_file(str(self.base / "model.safetensors"))

    def w(self, layer: int) -> torch.Tensor:
        """Base weight of an attention output projection, float64 [out, in]."""
        return self.base_weights[O_PROJ.format(layer)].double()

    def blocks(self, layer: int, parametrization: Parametrization | None = None) -> FloatArray:
        """[N, 8, 8] rotations of a layer, by the gates' own or another parametrization."""
        if parametrization is None:
            return self.rotations.blocks[Target(layer)].copy()
        if parametrization is Parametrization.MATRIX:
            return self.rotations.theta[Target(layer)].copy()
        options = RotationOptions(parametrization=parametrization)
        return read_rotations(self.gates, options).blocks[Target(layer)].copy()

    def r(self, layer: int) -> torch.Tensor:
        """The dense float64 rotation of a layer."""
        return dense(self.blocks(layer))

    @contextmanager
    def tensors(self) -> Iterator[dict[str, torch.Tensor]]:
        """The stored tensors of the copy; changes are written back."""
        path = self.out / "model.safetensors"
        tensors = load_file(str(path))
        yield tensors
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, str(path), metadata={"format": "pt"})

    def store(self, value: Callable[[int], torch.Tensor], *layers: int) -> None:
        """Replace the folded weight of some layers (all if none are named)."""
        with self.tensors() as tensors:
            for layer in layers or self.layers:
                name = O_PROJ.format(layer)
                tensors[name] = value(layer).to(tensors[name].dtype)

    def edit(self, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Change one stored tensor, in its own dtype."""
        with self.tensors() as tensors:
            tensors[name] = change(tensors[name])

    def edit_json(self, file: str, change: Callable[[dict[str, Any]], None]) -> None:
        """Change a JSON file of the copy in place."""
        path = self.out / file
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")


def dense(blocks: FloatArray) -> torch.Tensor:
    """diag(R_1 … R_N), float64."""
    return torch.block_diag(*torch.from_numpy(blocks))
