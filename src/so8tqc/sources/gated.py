"""The pre-bake model: base weights plus rotation gates, applied by forward hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from so8tqc.decoder import attention_output_of, decoder_stack, is_conv1d
from so8tqc.errors import RotationError, ShapeError
from so8tqc.rotations.enums import Site
from so8tqc.rotations.rotation_set import RotationSet, Target
from so8tqc.sources.hf import HFModel, head_blocks
from so8tqc.sources.placement import execution_device
from so8tqc.sources.protocol import TokenIds
from so8tqc.sources.seen import images_of

if TYPE_CHECKING:
    import torch

_Gate = tuple[Any, "torch.Tensor"]
"""A projection, and its blocks [N, b, b]."""


class HasModules(Protocol):
    """A transformers model, loaded or not.

    Attributes:
        module: the model.
        path: the directory it is from.
    """

    module: Any
    path: Path


class GatedSource:
    """A model with its gates as a logit source.

    Args:
        model: the base model, shared with other sources; gates are present only
            while the backbone runs.
        rotations: one rotation for every target they name.
        name: label for reports.
        spare_pictures: the gates act on positions of text alone. No training is known to be meant
            so; one that does it by mistake is found by this.
    """

    def __init__(
        self, model: HFModel, rotations: RotationSet, name: str, *, spare_pictures: bool = False
    ) -> None:
        self._spare = spare_pictures
        self.model = model
        self.rotations = rotations
        self.name = name
        self.vocab_size = model.vocab_size
        self._gates = gates_of(model, rotations)

    def logits(self, tokens: TokenIds, rows: int, first: int = 0) -> Iterator[torch.Tensor]:
        """See :class:`so8tqc.sources.protocol.LogitSource`."""
        before_head = self.rotations.site is Site.HEAD
        images = images_of(tokens) if self._spare else None
        spared = None if images is None else images.mask
        with installed([] if before_head else self._gates, self.rotations.site, spared):
            hidden = self.model.hidden(tokens)
        if before_head:
            hidden = gated_states(hidden, self._gates)
        yield from head_blocks(self.model, hidden[first:], rows)

    def close(self) -> None:
        """Release the model."""
        self._gates = []
        self.model.close()


def gated_states(hidden: torch.Tensor, gates: Sequence[_Gate]) -> torch.Tensor:
    """[T, D] hidden states behind the gates in front of the output head."""
    for _, blocks in gates:
        hidden = apply_blocks(hidden, blocks)
    return hidden


@contextmanager
def gated(model: HFModel, rotations: RotationSet) -> Iterator[None]:
    """Install the gates for the duration of a ``with``.

    With column blocks C (see ``RotationSet.column_blocks``) a gate computes
    x ↦ C·x on each block of b features: before the projection at the input
    site, on its result (bias included) at the output site.

    Raises:
        RotationError: a target's module does not exist in the model.
        ShapeError: N·b differs from the projection's features at the site.
    """
    with installed(gates_of(model, rotations), rotations.site):
        yield


def gates_of(
    model: HasModules, rotations: RotationSet, targets: Iterable[Target] | None = None
) -> list[_Gate]:
    """Each target's module, and its blocks where it computes; None: of all targets."""
    gates: dict[int, _Gate] = {}  # a module at several layers has one gate, not one for each
    for target in rotations if targets is None else targets:
        module = projection(model, target)
        gates.setdefault(id(module), (module, _device_blocks(rotations, target, module)))
    return list(gates.values())


@contextmanager
def installed(
    gates: Sequence[_Gate], site: Site, spared: npt.NDArray[np.bool_] | None = None
) -> Iterator[None]:
    """Gates at a site of their modules for the duration of a ``with``.

    Positions that are ``spared`` pass as they are.
    """
    handles = []
    try:
        for module, blocks in gates:
            if site.is_before:
                handles.append(module.register_forward_pre_hook(_input_hook(blocks, spared)))
            else:
                handles.append(module.register_forward_hook(_output_hook(blocks, spared)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def projection(model: HasModules, target: Target) -> Any:
    """The module that a target names.

    Raises:
        RotationError: it does not exist.
    """
    if target.is_head:
        return model.module.get_output_embeddings()
    layers = decoder_layers(model)
    name = target.module or attention_output_of(model.module)
    if target.layer >= len(layers):
        raise RotationError(
            f"there is a gate for layer {target.layer}, the model has {len(layers)} layers",
            where=str(model.path),
        )
    try:
        return layers[target.layer].get_submodule(name)
    except AttributeError:
        raise RotationError(f"{target}: no module {name}", where=str(model.path)) from None


def decoder_layers(model: HasModules) -> Any:
    """The list of decoder layers of the text tower.

    Raises:
        RotationError: there is none, or more than one.
    """
    return decoder_stack(model.module)[1]


def features(module: Any) -> tuple[int, int]:
    """(in_features, out_features) of a Linear or of GPT-2's transposed Conv1D."""
    if is_conv1d(module):
        return int(module.weight.shape[0]), int(module.nf)
    return int(module.in_features), int(module.out_features)


def apply_blocks(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """x ↦ C·x block by block: x [..., N·b], blocks [N, b, b] → [..., N·b] in x's dtype.

    (C·x)_i = Σ_j C_ij x_j on each block: ``i, j`` index rows and columns of C. Computed in the
    blocks' dtype, and rounded once.
    """
    import torch

    count, size, _ = blocks.shape
    rotated = torch.einsum(
        "nij,...nj->...ni", blocks, x.to(blocks.dtype).reshape(*x.shape[:-1], count, size)
    )
    return rotated.flatten(-2).to(x.dtype)


def _device_blocks(rotations: RotationSet, target: Target, module: Any) -> torch.Tensor:
    import torch

    blocks = rotations.column_blocks(target)
    width = features(module)[0 if rotations.site.is_before else 1]
    if blocks.shape[0] * blocks.shape[1] != width:
        raise ShapeError(
            f"{blocks.shape[0]} blocks of {blocks.shape[1]} do not cover {width} features "
            f"at the {rotations.site} of the projection",
            where=f"{rotations.source}, {target}",
        )
    # in bfloat16 R would no longer be a rotation: its rows would be off by 2⁻⁹
    dtype = torch.promote_types(module.weight.dtype, torch.float32)
    return torch.from_numpy(blocks).to(execution_device(module), dtype)


def _gated(
    x: torch.Tensor, blocks: torch.Tensor, spared: npt.NDArray[np.bool_] | None
) -> torch.Tensor:
    """The gate's result; at spared positions of [..., T, D] what came in."""
    import torch

    if spared is None:
        return apply_blocks(x, blocks)
    keep = torch.from_numpy(spared).to(x.device)[:, None]
    return torch.where(keep, x, apply_blocks(x, blocks))


def _input_hook(blocks: torch.Tensor, spared: npt.NDArray[np.bool_] | None) -> Any:
    def hook(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_gated(args[0], blocks, spared), *args[1:])

    return hook


def _output_hook(blocks: torch.Tensor, spared: npt.NDArray[np.bool_] | None) -> Any:
    def hook(_module: Any, _args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return _gated(output, blocks, spared)

    return hook
