"""What became of a checkpoint's tensors in a GGUF file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class TensorComparison:
    """What became of the source tensors in the GGUF file.

    Attributes:
        architecture: ``general.architecture`` of the file.
        equal: source tensor → what was done to it (``unchanged``, …).
        different: source tensors whose bytes in the file are none that the converter may make.
        missing: source tensors without a counterpart in the file.
        unmapped: source tensors that the name map does not know, or that no text needs (other
            towers, layers that predict further tokens).
        extra: GGUF tensors that come from no source tensor.
        unattributed: GGUF tensors that may come from an unmapped tensor of their layer.
        untraced: GGUF tensors whose history cannot be replayed, and why.
        traced: the comparison is with the history of the conversion, not with a list of layouts.
    """

    architecture: str
    equal: dict[str, str] = field(default_factory=dict)
    different: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unmapped: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    unattributed: list[str] = field(default_factory=list)
    untraced: list[str] = field(default_factory=list)
    traced: bool = False

    @property
    def arrangements(self) -> dict[str, int]:
        """What was done → number of source tensors."""
        return dict(sorted(Counter(self.equal.values()).items()))
