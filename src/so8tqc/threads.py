"""How the numerics use the machine's cores: a few tensors at a time, one thread for each.

A product of 8×8 blocks is too small to share among torch's own threads; whole tensors are not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

WORKERS = min(4, os.cpu_count() or 1)
"""Tensors computed at a time: memory grows with it."""


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """torch's operations use one thread, in the whole process, until the context ends."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
