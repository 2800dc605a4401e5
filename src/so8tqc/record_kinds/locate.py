"""Where two models part: the error after each layer, and of each operation by itself."""

from __future__ import annotations

from so8tqc.record_kinds.base import Entry, Metrics


class LayerRow(Entry):
    """The output of one layer, or the logits.

    Attributes:
        layer: its number; None: the logits.
        error: ‖c − r‖ / ‖r‖ of the candidate as it runs, what its layers before have made included.
        explained: the same of honest rounding to the candidate's types.
        own: of the layer alone, given what the reference's layer is given; None of the logits.
        own_explained: the same of honest rounding.
        limit: up to which its own error is explained; None of the logits.
        wrong: whether it is not.
    """

    layer: int | None
    error: float
    explained: float
    own: float | None = None
    own_explained: float | None = None
    limit: float | None = None
    wrong: bool


class OperationRow(Entry):
    """One operation on the reference's inputs.

    Attributes:
        layer: None around the layers.
        operation: norm, q, k, v, rope, attention, o, residual, mlp, router, experts, head …
        module: its name below the layer.
        error: ‖c − r‖ / ‖r‖ of its value.
        explained: the same of honest rounding.
        limit: up to which it is explained.
        gain: ⟨c, r⟩ / ⟨r, r⟩; of products with a weight only.
        gain_limit: how far from 1 that is explained.
        wrong: whether something is not explained.
        cause: what explains it; "" if it is right, or nothing known does.
    """

    layer: int | None
    operation: str
    module: str
    error: float
    explained: float
    limit: float
    gain: float | None = None
    gain_limit: float | None = None
    wrong: bool
    cause: str = ""

    @property
    def place(self) -> str:
        """``layer 1, q (self_attn.q_proj)``."""
        layer = "" if self.layer is None else f"layer {self.layer}, "
        return f"{layer}{self.operation} ({self.module})"


class RuntimeRow(Entry):
    """A value of libllama's beside what the file's weights make of libllama's own input.

    Attributes:
        layer: None behind the layers.
        operation, node: its word, and what libllama calls it.
        error: ‖l − w‖ / ‖w‖.
        explained: of rounding activations and cache as libllama does.
        limit: up to which it is explained.
        inherited: ‖l − r‖ / ‖r‖ from the reference, of layers' outputs.
    """

    layer: int | None
    operation: str
    node: str
    error: float
    explained: float
    limit: float
    inherited: float | None = None
    wrong: bool


class LocateMetrics(Metrics):
    """Of kind ``locate``.

    Attributes:
        layers: in order, the logits last.
        operations: in the order in which they are computed.
        types: stored types of the candidate.
        texts, tokens: how many were run.
        keys: what the candidate's configuration says otherwise.
        runtime: of a GGUF, libllama's values; None where it was not run.
    """

    layers: list[LayerRow]
    operations: list[OperationRow]
    types: str
    texts: int
    tokens: int
    keys: list[str]
    runtime: list[RuntimeRow] | None = None

    @property
    def wrong(self) -> list[OperationRow]:
        """Operations that are not explained."""
        return [row for row in self.operations if row.wrong]

    @property
    def first(self) -> OperationRow | None:
        """The first of them."""
        return next(iter(self.wrong), None)
