"""The file that an honest encoder would have made: the same types, of the reference's own weights.

What a quantized file loses depends on the model more than on the file: a Q4_K_M of a small model
may lose ten times what one of a large model does. So the limit of a file is measured, as a bake's
is by the noise floor of its storage type: every tensor of the file is encoded again, by ggml's own
kernels, from what the reference's weights are before any rounding, and the result is run beside it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from so8tqc.gguf.conversion import UntraceableError
from so8tqc.gguf.file import GGUFFile, GGUFTensor
from so8tqc.gguf.tensor_map import GENERATED
from so8tqc.llama.ggml import encode
from so8tqc.progress import SILENT, Progress
from so8tqc.services.tensors.expected import Expected
from so8tqc.services.tensors.measure import INTEGERS, PLAIN
from so8tqc.threads import WORKERS, one_torch_thread

_CHUNK = 1 << 22
"""Weights encoded at once by a thread."""


def is_quantized(gguf: GGUFFile) -> bool:
    """Whether any tensor has a type that chooses codes for blocks of weights."""
    return any(tensor.type not in PLAIN | INTEGERS for tensor in gguf.tensors.values())


def write_honest(
    gguf: GGUFFile, expected: Expected, folder: Path, progress: Progress = SILENT
) -> Path:
    """Write the file as an honest encoder would have made it: plain rounding, without importance.

    Key-values, the order of the tensors and their types are the file's; what the converter makes
    without any weight (rope factors) stays as stored.

    Args:
        gguf: the file.
        expected: what its tensors must stand for.
        folder: where it is written, under the file's name; a model in several files stays so.
        progress: told about tensors.

    Returns:
        The file, the first of several.

    Raises:
        UntraceableError: it cannot be told what a tensor stands for, or it has another shape.
        ToolError: libggml cannot encode a type.
        OSError: it cannot be written.
    """
    parts = {part: folder / part.name for part in gguf.parts or (gguf.path,)}
    unknown = [n for n in gguf.tensors if n not in expected.names and n not in GENERATED]
    if unknown:
        raise UntraceableError(f"nothing is known of {unknown[0]}")
    for part, copy in parts.items():
        shutil.copyfile(part, copy)
    tensors = [tensor for name, tensor in gguf.tensors.items() if name in expected.names]
    total = sum(tensor.elements for tensor in tensors)
    with (
        progress.task("encoding the floor", total=total, unit="weights") as task,
        one_torch_thread(),
        ThreadPoolExecutor(max_workers=WORKERS) as pool,
    ):

        def write(tensor: GGUFTensor) -> None:
            if tensor.type not in INTEGERS:
                with parts[tensor.file or gguf.path].open("r+b") as out:
                    out.seek(tensor.offset)
                    for stored in _encoded(tensor, expected):
                        out.write(stored.tobytes())
            task.advance(tensor.elements, item=tensor.name)

        list(pool.map(write, tensors))
    return parts[(gguf.parts or (gguf.path,))[0]]


def _encoded(tensor: GGUFTensor, expected: Expected) -> Iterator[npt.NDArray[np.uint8]]:
    """A tensor's bytes, some rows at a time."""
    values = expected.values(tensor.name, dtype="F32")
    if values.size != tensor.elements or not np.isfinite(values).all():
        raise UntraceableError(f"{tensor.name} has another shape, or stands for what is not finite")
    rows = values.reshape(-1, tensor.shape[-1])
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        yield encode(rows[start : start + step], tensor.type)
