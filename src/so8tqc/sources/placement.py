"""Where a model's weights are: on one device, or spread by accelerate over GPUs, memory and disk.

What does not fit is loaded anew whenever its module runs (``AlignDevicesHook``), and is a shape
without values in between.
"""

from __future__ import annotations

import functools
from collections import ChainMap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from so8tqc.errors import ToolError
from so8tqc.sources.protocol import TokenIds

if TYPE_CHECKING:
    import torch


def execution_device(module: Any) -> torch.device:
    """The device on which a module computes, wherever its weights are kept meanwhile."""
    import torch

    hook = _offloading_hook(module)
    device = module.weight.device if hook is None else torch.device(hook.execution_device)
    placed: torch.device = device
    return placed


def on_cpu(block: torch.Tensor) -> torch.Tensor:
    """Logits where numpy can read them: on the CPU, float32 or float64."""
    import torch

    return block.to("cpu", torch.promote_types(block.dtype, torch.float32))


def ids_on(tokens: TokenIds, device: torch.device) -> torch.Tensor:
    """[T] ids on a device, copied there without waiting for the copy or for earlier GPU work."""
    import torch

    ids = torch.from_numpy(np.ascontiguousarray(tokens))
    if device.type != "cuda":
        return ids.to(device)
    return ids.pin_memory().to(device, non_blocking=True)


@functools.cache
def _second_stream(device: int) -> torch.cuda.Stream:
    """One second stream for each device: cuBLAS keeps memory for every stream it has seen."""
    import torch

    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def beside_the_models() -> Iterator[None]:
    """What is told to the GPU inside runs beside the models' passes, not between them.

    These stay in the order of the default stream (:func:`passing`). They wait for the GPU at their
    beginning (transformers looks at the positions), and would wait for all that was told before.
    """
    import torch

    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):  # type: ignore[no-untyped-call]
        yield
        return
    stream = _second_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def passing(device: torch.device) -> Iterator[None]:
    """A model's pass, on a GPU in its default stream, where weights are loaded and changed."""
    import torch

    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.default_stream(device)):
        yield


def followed(result: torch.Tensor) -> torch.Tensor:
    """The result of a pass, for whatever stream goes on with it."""
    import torch

    if result.device.type == "cuda":
        current = torch.cuda.current_stream(result.device)
        default = torch.cuda.default_stream(result.device)
        if current != default:
            current.wait_stream(default)
            result.record_stream(current)
    return result


def on_the_way(table: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU that is whole once the stream's next event has happened (:func:`sent`)."""
    import torch

    if table.device.type == "cpu":
        return table
    here = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
    return here.copy_(table, non_blocking=True)


def sent(device: torch.device | None) -> torch.cuda.Event | None:
    """An event after all that a GPU was told in this stream; None if it is none."""
    import torch

    if device is None or device.type == "cpu":
        return None
    event: torch.cuda.Event = torch.cuda.current_stream(device).record_event()
    return event


@contextmanager
def enough_gpu_memory(task: str, where: str) -> Iterator[None]:
    """Say what a GPU had no room for, and what helps.

    Raises:
        ToolError: it ran out of memory.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise ToolError(
            f"the GPU's memory does not suffice for {task}",
            where=where,
            remedy="Give shorter texts (--max-tokens, --ctx), let --device-map auto spread the "
            "models, or hide the GPU (CUDA_VISIBLE_DEVICES=).",
        ) from None


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


def waiting_beside(replacement: Replacement) -> Replacement:
    """The replacement where the parameter is, so that nothing moves when they are exchanged.

    Raises:
        ToolError: the GPU has no room for it.
    """
    module, name, value = replacement
    if _offloading_hook(module) is not None:
        return replacement
    with enough_gpu_memory("a second copy of the folded weights", name):
        return replacement._replace(value=value.to(getattr(module, name).device))


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
