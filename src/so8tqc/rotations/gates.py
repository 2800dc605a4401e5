"""The trainable gate: a block rotation in front of each attention output projection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from so8tqc.decoder import attention_output_of, decoder_stack, has_module
from so8tqc.errors import RotationError
from so8tqc.rotations.enums import Parametrization

BLOCK_SIZE = 8


class RotationGate(nn.Module):
    """x ↦ R·x block by block (convention ``column``), R a differentiable function of theta.

    Args:
        features: D, a multiple of 8; the gate has N = D/8 blocks.
        parametrization: ``exp`` or ``cayley``.
        std: standard deviation of the initial theta; small, so that training starts near
            the base model.
        generator: source of the initial theta.

    Attributes:
        theta: parameter [N, 8, 8]; only its skew part matters.

    Raises:
        RotationError: D is not a multiple of 8, or another parametrization.
    """

    def __init__(
        self,
        features: int,
        *,
        parametrization: Parametrization = Parametrization.EXP,
        std: float = 1e-3,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if features % BLOCK_SIZE:
            raise RotationError(f"{features} features are no multiple of {BLOCK_SIZE}")
        if parametrization not in (Parametrization.EXP, Parametrization.CAYLEY):
            raise RotationError(f"a gate cannot be trained with {parametrization}")
        self.parametrization = parametrization
        shape = (features // BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE)
        self.theta = nn.Parameter(torch.randn(shape, generator=generator) * std)

    def rotations(self) -> Tensor:
        """R of every block, [N, 8, 8], from A = θ − θᵀ.

        ``exp``: expm(A). ``cayley``: (I − A/2)⁻¹(I + A/2).
        """
        a = self.theta - self.theta.transpose(1, 2)
        if self.parametrization is Parametrization.EXP:
            r: Tensor = torch.linalg.matrix_exp(a)
            return r
        eye = torch.eye(BLOCK_SIZE, dtype=a.dtype, device=a.device)
        r = torch.linalg.solve(eye - a / 2, eye + a / 2)
        return r

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]: (R·x)_i = Σ_j R_ij x_j within each block."""
        blocks = x.unflatten(-1, (-1, BLOCK_SIZE))  # type: ignore[no-untyped-call]
        rotated = torch.einsum("nij,...nj->...ni", self.rotations().to(x.dtype), blocks)
        return rotated.flatten(-2)


@contextmanager
def attached_gates(
    model: Any,
    *,
    parametrization: Parametrization = Parametrization.EXP,
    std: float = 1e-3,
    seed: int = 0,
) -> Iterator[dict[int, RotationGate]]:
    """Put a gate in front of every attention output projection; freeze the base.

    Args:
        model: a transformers causal language model.
        parametrization, std: see :class:`RotationGate`.
        seed: of the initial thetas.

    Yields:
        layer → gate. On leaving, the hooks are removed and the base's ``requires_grad`` is
        as it was.
    """
    generator = torch.Generator().manual_seed(seed)
    name = attention_output_of(model)
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    gates: dict[int, RotationGate] = {}
    handles = []
    try:
        for parameter, _ in trainable:
            parameter.requires_grad_(False)
        for i, layer in enumerate(decoder_stack(model)[1]):
            if not has_module(layer, name):
                continue  # a hybrid's layer without attention
            projection = layer.get_submodule(name)
            gate = RotationGate(
                projection.in_features,
                parametrization=parametrization,
                std=std,
                generator=generator,
            ).to(projection.weight.device)
            gates[i] = gate
            handles.append(projection.register_forward_pre_hook(_hook(gate)))
        yield gates
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


def _hook(gate: RotationGate) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (gate(args[0]), *args[1:])

    return hook
