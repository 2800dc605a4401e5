"""What the record of ``quantize`` holds so that its files can be made again and compared."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from so8tqc.gguf.file import GGUFFile
from so8tqc.llama.build import library_build
from so8tqc.record_kinds.quantize import Derivation


def derivation(tensors: dict[str, dict[str, str]]) -> Derivation:
    """The derivation of quantized files, for their record: file name → tensor → digest."""
    return Derivation(build=library_build(), tensors=tensors)


def tensor_digests(gguf: GGUFFile) -> dict[str, str]:
    """Tensor → SHA-256 of its stored bytes."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        digests = pool.map(lambda t: t.sha256, gguf.tensors.values())
        return dict(zip(gguf.tensors, digests, strict=True))
