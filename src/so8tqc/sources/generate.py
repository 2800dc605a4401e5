"""Free-running generation with the logits it was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from so8tqc.sources.hf import HFModel
from so8tqc.sources.placement import ids_on
from so8tqc.sources.protocol import TokenIds

if TYPE_CHECKING:
    import torch


def greedy(logits: torch.Tensor) -> int:
    """The most likely token of [V] logits."""
    return int(logits.argmax())


def sampled(seed: int) -> Callable[[torch.Tensor], int]:
    """Draws from softmax(z) of [V] logits, step by step, by the Gumbel-max trick.

    argmax (z + g), with g independent standard Gumbel numbers, has the distribution softmax(z)
    (Gumbel, 1954). Two models that are given the same numbers draw the same token wherever their
    logits are nearly equal.

    Args:
        seed: of the numbers; each step takes V of them.
    """
    generator = np.random.default_rng(seed)

    def pick(logits: torch.Tensor) -> int:
        return int((logits.double().numpy() + generator.gumbel(size=logits.numel())).argmax())

    return pick


def hf_steps(
    model: HFModel, tokens: TokenIds, max_new_tokens: int, pick: Callable[[torch.Tensor], int]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Generate with a transformers model and its cache: (token, the logits [V] it came from).

    Args:
        model: the model.
        tokens: [T] the prompt.
        max_new_tokens: at most so many steps; fewer when the model ends its text.
        pick: chooses the next token.
    """
    import torch

    ends = model.config.eos_token_id
    stops = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    ids = ids_on(tokens, model.device)[None]
    cache = None
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            output = model.module(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        cache = output.past_key_values
        logits = output.logits[0, -1].float().cpu()
        token = pick(logits)
        yield token, logits
        if token in stops:
            return
        ids = torch.tensor([[token]], device=model.device)
