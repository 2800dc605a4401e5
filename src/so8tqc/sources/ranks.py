"""Several processes, one comparison: each takes some of the texts, all get every result.

``accelerate launch`` and ``torchrun`` start one process for each GPU, or as many as asked for, on
one machine or several, and tell each its rank in the environment. What is gathered goes through
memory and the network, not through GPUs, so that several processes may share one.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from typing import TypeVar

from so8tqc.errors import So8tqcError
from so8tqc.sources.protocol import EncodedText

_Result = TypeVar("_Result")
_Packed = tuple[type[So8tqcError], str, str | None, str | None]


def rank() -> int:
    """This process's number, 0 where there is only one."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def count() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number among those on this machine: its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """Whether this process is the one that shows and writes results."""
    return rank() == 0


def share(texts: Sequence[EncodedText]) -> list[int]:
    """The indices of this process's texts: the longest first, each to whoever has least.

    Every process computes the same shares by itself.
    """
    loads = [0] * count()
    shares: list[list[int]] = [[] for _ in loads]
    for index in sorted(range(len(texts)), key=lambda i: (-texts[i].tokens.size, i)):
        least = loads.index(min(loads))
        shares[least].append(index)
        loads[least] += int(texts[index].tokens.size)
    return sorted(shares[rank()])


def together(results: dict[int, _Result], error: So8tqcError | None) -> dict[int, _Result]:
    """What every process found, in order of index; waits for all of them.

    Args:
        results: text index → this process's result.
        error: what stopped this process, if anything did.

    Raises:
        So8tqcError: the error of the lowest rank that had one, in every process.
    """
    if count() == 1:
        if error is not None:
            raise error
        return results
    from accelerate.utils import gather_object

    _join()
    everybody = gather_object([(results, _packed(error))])
    for _, packed in everybody:
        if packed is not None:
            kind, what, where, remedy = packed
            raise kind(what, where=where, remedy=remedy)
    return dict(sorted(item for found, _ in everybody for item in found.items()))


def wait_for_all() -> None:
    """Return once every process has come here; at once where there is only one."""
    if count() == 1:
        return
    import torch

    _join()
    torch.distributed.barrier()


def _join() -> None:
    """Join the other processes, the first time, and leave them in order when this one ends.

    What is gathered are tables in memory: it goes over the network (gloo), whatever computed them,
    since GPUs would do it only for processes that have one each (NCCL). A process that ends in the
    group still has its threads, and may be aborted for it.
    """
    import torch
    from accelerate import PartialState

    if torch.distributed.is_initialized():
        return  # by us, or by whoever uses us as a library and leaves by himself
    PartialState(cpu=True)
    atexit.register(_leave)


def _leave() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _packed(error: So8tqcError | None) -> _Packed | None:
    return None if error is None else (type(error), error.what, error.where, error.remedy)
