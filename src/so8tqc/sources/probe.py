"""One forward pass that leaves everything the long-text stage looks at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from so8tqc.metrics.smoothness import ENERGY, HIGH, hidden_sums, share
from so8tqc.rotations.rotation_set import RotationSet
from so8tqc.sources.attention import (
    AttentionEntropy,
    UnsupportedAttentionError,
    attention_entropy,
    supports_entropy,
)
from so8tqc.sources.gated import decoder_layers, gated
from so8tqc.sources.hf import HFModel, head_blocks
from so8tqc.sources.protocol import TokenIds

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Probe:
    """What one model did on one text.

    Attributes:
        hidden: [T, D] after the final norm.
        sums: [layers, T − 4, 3], what each token adds to the energies of each layer's output:
            see ``metrics.smoothness``.
        entropy: [layers, heads, T] attention entropy in nats, None where the architecture's
            attention cannot be measured.
    """

    hidden: torch.Tensor
    sums: npt.NDArray[np.float64]
    entropy: npt.NDArray[np.float32] | None

    @property
    def energy(self) -> npt.NDArray[np.float64]:
        """[layers] second-difference energy, relative to all energy."""
        return share(self.sums, ENERGY)

    @property
    def high_frequency(self) -> npt.NDArray[np.float64]:
        """[layers] share of energy at periods below 4 tokens."""
        return share(self.sums, HIGH)


def probe(model: HFModel, tokens: TokenIds, rotations: RotationSet | None = None) -> Probe:
    """Run a model once (with gates, if given) and measure.

    Raises:
        DataError: the text is longer than the model's context.
    """
    with ExitStack() as stack:
        if rotations is not None:
            stack.enter_context(gated(model, rotations))
        sums = stack.enter_context(_layer_sums(model))
        hidden, collector = _run(model, tokens)
    entropy = collector.array() if collector is not None and collector.layers else None
    return Probe(hidden, np.stack([sums[i] for i in sorted(sums)]), entropy)


def _run(model: HFModel, tokens: TokenIds) -> tuple[torch.Tensor, AttentionEntropy | None]:
    """Hidden states [T, D] and, where the attention can be measured, its entropies.

    Some architectures show only when they run that they cannot be measured; they run again,
    with their own attention.
    """
    if supports_entropy(model):
        with suppress(UnsupportedAttentionError), attention_entropy(model) as collector:
            return model.hidden(tokens), collector
    return model.hidden(tokens), None


class ProbedSource:
    """The logits of a model whose hidden states were already computed, text by text.

    Args:
        model: gives the output head.
        name: label for reports.
    """

    def __init__(self, model: HFModel, name: str) -> None:
        self.model = model
        self.name = name
        self.vocab_size = model.vocab_size
        self.hidden: torch.Tensor | None = None

    def logits(self, tokens: TokenIds, rows: int, first: int = 0) -> Iterator[torch.Tensor]:
        """See :class:`so8tqc.sources.protocol.LogitSource`; ``hidden`` must be of these tokens."""
        if self.hidden is None or self.hidden.shape[0] != tokens.size:
            raise ValueError("the hidden states are not those of this text")
        yield from head_blocks(self.model, self.hidden[first:], rows)

    def close(self) -> None:
        """Release the model."""
        self.hidden = None
        self.model.close()


@contextmanager
def _layer_sums(model: HFModel) -> Iterator[dict[int, npt.NDArray[np.float64]]]:
    """``hidden_sums`` of every layer's output, computed as it passes."""
    sums: dict[int, npt.NDArray[np.float64]] = {}

    def hook(index: int) -> Any:
        def measure(_module: Any, _args: Any, output: Any) -> None:
            h = output[0] if isinstance(output, tuple) else output
            sums[index] = hidden_sums(h[0] if h.ndim == 3 else h)

        return measure

    handles = [
        layer.register_forward_hook(hook(i)) for i, layer in enumerate(decoder_layers(model))
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
