"""Free-running generation with the logits it was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from so8tqc.sources.hf import HFModel
from so8tqc.sources.protocol import TokenIds

if TYPE_CHECKING:
    import torch


def greedy(logits: torch.Tensor) -> int:
    """The most likely token of [V] logits."""
    return int(logits.argmax())


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
    ids = torch.from_numpy(np.ascontiguousarray(tokens))[None].to(model.device)
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
