"""Our own exact fold as a logit source: what any bake can at best achieve."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from so8tqc.decoder import is_conv1d
from so8tqc.rotations.enums import Site
from so8tqc.rotations.fold import fold, orient
from so8tqc.rotations.rotation_set import RotationSet, Target
from so8tqc.sources.gated import HasModules, projection
from so8tqc.sources.hf import HFModel, head_blocks
from so8tqc.sources.placement import Replacement, replaced, stored, waiting_beside
from so8tqc.sources.protocol import TokenIds

if TYPE_CHECKING:
    import torch


class FoldedSource:
    """The base model with its target weights replaced by their exact fold.

    With ``storage`` the fold is rounded once to that dtype, as a correct bake would
    store it: its distance from the gated model is the *noise floor*. Without, it is
    rounded to the compute dtype only: its distance is the arithmetic's own error.

    Args:
        model: the base model, shared with other sources.
        rotations: what is folded.
        name: label for reports.
        storage: torch dtype name (``bfloat16`` …), or None for the compute dtype.
    """

    def __init__(
        self, model: HFModel, rotations: RotationSet, name: str, storage: str | None
    ) -> None:
        self.model = model
        self.name = name
        self.vocab_size = model.vocab_size
        self._before_head = rotations.site is Site.HEAD
        self._folded = list(fold_targets(model, rotations, rotations, storage))

    def logits(self, tokens: TokenIds, rows: int, first: int = 0) -> Iterator[torch.Tensor]:
        """See :class:`so8tqc.sources.protocol.LogitSource`."""
        with replaced(self._folded):
            hidden = self.model.hidden(tokens)[first:]
        if not self._before_head:
            yield from head_blocks(self.model, hidden, rows)
            return
        for start in range(0, hidden.shape[0], rows):
            with replaced(self._folded):  # other sources share the head between two blocks
                block = self.model.head(hidden[start : start + rows])
            yield block

    def close(self) -> None:
        """Release the model."""
        self._folded = []
        self.model.close()


def fold_targets(
    model: HasModules, rotations: RotationSet, targets: Iterable[Target], storage: str | None
) -> Iterator[Replacement]:
    """The folded value of each target's weight, and of its bias at the output site."""
    import torch

    modules = {id(m): (t, m) for t in targets for m in [projection(model, t)]}  # shared ones once
    for target, module in modules.values():
        names = ["weight"]
        if rotations.site is Site.OUTPUT and module.bias is not None:
            names.append("bias")
        for name in names:
            value = stored(module, name)
            dtype = getattr(torch, storage) if storage else value.dtype
            view, blocks = orient(
                value, rotations.column_blocks(target), rotations.site, transposed=is_conv1d(module)
            )
            view.copy_(fold(view, blocks, dtype))
            yield waiting_beside(Replacement(module, name, value))
