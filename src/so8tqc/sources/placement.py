"""Where a model's weights are: on one device, or spread by accelerate over GPUs, memory and disk.

What does not fit is loaded anew whenever its module runs (``AlignDevicesHook``), and is a shape
without values in between.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


def execution_device(module: Any) -> torch.device:
    """Where a module computes, wherever its weights wait meanwhile."""
    import torch

    hook = _offloading_hook(module)
    device = module.weight.device if hook is None else torch.device(hook.execution_device)
    placed: torch.device = device
    return placed


def stored(module: Any, name: str) -> torch.Tensor:
    """A copy of one of a module's own parameters, on the CPU, wherever it waits."""
    hook = _offloading_hook(module)
    value = getattr(module, name) if hook is None else hook.weights_map[name]
    copy: torch.Tensor = value.detach().to("cpu", copy=True)
    return copy


class Replacement(NamedTuple):
    """Another value for one of a module's own parameters."""

    module: Any
    name: str
    value: torch.Tensor


@contextmanager
def replaced(replacements: Sequence[Replacement]) -> Iterator[None]:
    """Let modules compute with other values for the duration of a ``with``."""
    originals: list[Any] = []
    try:
        for module, name, value in replacements:
            hook = _offloading_hook(module)
            if hook is None:
                parameter = getattr(module, name)
                originals.append(parameter.data)
                parameter.data = value.to(parameter.device)
            else:
                originals.append(hook.weights_map)
                hook.weights_map = ChainMap({name: value}, hook.weights_map)
        yield
    finally:
        done = list(zip(replacements, originals, strict=False))
        for (module, name, _), original in reversed(done):
            hook = _offloading_hook(module)
            if hook is None:
                getattr(module, name).data = original
            else:
                hook.weights_map = original


def _offloading_hook(module: Any) -> Any:
    """accelerate's hook that brings a module's weights when it runs; None if they stay in place."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):  # a SequentialHook holds several
        if getattr(part, "offload", False):
            return part
    return None
