"""Which experts a model chooses for each token, and which of these choices rounding may turn.

Where the last expert chosen and the first one left out have nearly the same score, an error of the
arithmetic decides between them: another expert runs, and that token's logits, and those of all that
attend to it, differ by much more than the arithmetic's error. That is no fault of a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch


class Choice(NamedTuple):
    """One router's choice for every token.

    Attributes:
        scores: [T, E], what the choice was made by.
        chosen: how many experts were chosen.
    """

    scores: torch.Tensor
    chosen: int


def watching(tokens: int) -> Any:
    """A context in which every choice of some among several for each of so many tokens is noted.

    Its attribute ``choices`` has them in the order in which they were made.
    """
    from torch.overrides import TorchFunctionMode

    class Watching(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.choices: list[Choice] = []

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            options = kwargs or {}
            if getattr(func, "__name__", "") == "topk":
                scores = args[0] if args else options["input"]
                chosen = int(args[1] if len(args) > 1 else options["k"])
                if scores.shape[:-1].numel() == tokens and chosen < scores.shape[-1]:
                    flat = scores.detach().reshape(tokens, -1)
                    self.choices.append(Choice(flat.float().cpu(), chosen))
            return func(*args, **options)

    return Watching()


class Routed(NamedTuple):
    """Whose choices of experts are looked at, and what error their scores have.

    Attributes:
        exact: name of the source that is run as it is.
        rounded: of one whose arithmetic or weights are rounded; None: no such one is run.
        unit: error of every score besides, as a share of the token's largest.
    """

    exact: str
    rounded: str | None
    unit: float


def ties(
    exact: Sequence[Choice], rounded: Sequence[Choice] | None, unit: float = 0.0
) -> npt.NDArray[np.bool_]:
    """[T] whether a token's experts hang on rounding, in one router at least.

    They do where the gap between the last score chosen and the first one left out is no larger
    than twice the largest error of the token's scores: each of the two may be off by so much.

    Args:
        exact: choices of the model as it is.
        rounded: of the model with its arithmetic rounded, in the same order; None: of no such one.
        unit: error of every score besides, as a share of the token's largest.
    """
    import torch

    others: Sequence[Choice] = exact if rounded is None else rounded
    if not exact or len(exact) != len(others):
        return np.zeros(exact[0].scores.shape[0] if exact else 0, dtype=bool)
    found = torch.zeros(exact[0].scores.shape[0], dtype=torch.bool)
    for one, other in zip(exact, others, strict=True):
        error = (one.scores - other.scores).abs().nan_to_num(0.0).amax(dim=1)
        error = torch.maximum(error, unit * _largest(one.scores))
        best = one.scores.topk(one.chosen + 1, dim=1).values
        found |= best[:, -2] - best[:, -1] <= 2 * error
    return found.numpy()


def _largest(scores: torch.Tensor) -> torch.Tensor:
    """[T] the largest magnitude of each token's scores; excluded experts may have −inf."""
    import torch

    return scores.abs().masked_fill(torch.isinf(scores), 0.0).amax(dim=1)
