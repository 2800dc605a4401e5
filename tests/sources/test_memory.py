"""Memory of logit blocks: used again, but never while somebody holds it."""

from __future__ import annotations

import torch

from so8tqc.sources.memory import BlockMemory


def test_memory_is_used_again_once_the_last_view_is_gone() -> None:
    memory = BlockMemory()
    block = memory.take((4, 6), torch.float32)
    address = block.data_ptr()
    view = block[1:3]
    del block
    assert memory.take((4, 6), torch.float32).data_ptr() != address
    del view
    taken = [memory.take((2, 6), torch.float32) for _ in range(2)]
    assert address in [block.data_ptr() for block in taken]
    assert taken[0].data_ptr() != taken[1].data_ptr()


def test_a_larger_block_has_its_own_memory() -> None:
    memory = BlockMemory()
    memory.take((2, 3), torch.float32)
    block = memory.take((20, 30), torch.float64)
    assert block.fill_(1.0).sum() == 600
    assert block.dtype == torch.float64
