"""What a method is given of a module (tensors, shape, settings), and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from so8tqc.adapters.files import AdapterFiles, array, number
from so8tqc.adapters.steps import Step
from so8tqc.errors import RotationError, ShapeError
from so8tqc.rotations.files.peft_config import CONFIG_NAME
from so8tqc.rotations.rotation_set import FloatArray


@dataclass(frozen=True)
class Shape:
    """[out, in] of a module's logical weight."""

    out: int
    into: int


@dataclass(frozen=True)
class ModuleSteps:
    """What an adapter does to one module.

    Attributes:
        steps: of its weight.
        bias: added to its bias, [out]; None: nothing.
        mix: a step of its bias, too (of what turns or scales outputs); None: none.
        zero: the effect is nil, whatever the input: untrained.
        columnwise: the steps are of the transposed weight (DoRA of an embedding).
    """

    steps: tuple[Step, ...]
    bias: FloatArray | None = None
    mix: Step | None = None
    zero: bool = False
    columnwise: bool = False


Parts = Mapping[str, torch.Tensor]


Weight = Callable[[], torch.Tensor]
"""Loads the logical weight [out, in]; only PSOFT asks for it."""


@dataclass(frozen=True)
class Context:
    """One module of an adapter: its tensors by name, and the weight that they belong to."""

    files: AdapterFiles
    module: str
    parts: Parts
    shape: Shape
    weight: Weight
    embedding: bool

    @property
    def where(self) -> str:
        return f"{self.files.directory}, {self.module}"

    def take(self, name: str) -> FloatArray:
        """A part that must be there, in float64."""
        return array(self.tensor(name))

    def tensor(self, name: str) -> torch.Tensor:
        """A part that must be there, as stored."""
        if name not in self.parts:
            raise RotationError(
                f"{name} is missing (there is {', '.join(sorted(self.parts))})", where=self.where
            )
        return self.parts[name]

    def only(self, *names: str) -> None:
        """Refuse any other part."""
        if extra := sorted(self.parts.keys() - set(names)):
            raise RotationError(
                f"{', '.join(extra)}: no part of {self.files.kind} here", where=self.where
            )

    def setting(self, key: str, default: float) -> float:
        """A number of the configuration."""
        return number(self.files.config, key, default, str(self.files.directory / CONFIG_NAME))

    def require(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise ShapeError(
                f"{name} has shape {list(found)}, expected {list(expected)} for a weight of "
                f"{self.shape.out} × {self.shape.into} (out × in)",
                where=self.where,
                remedy="The adapter belongs to another base model, or its configuration does not "
                "belong to its tensors.",
            )
