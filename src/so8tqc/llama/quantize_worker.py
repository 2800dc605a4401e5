"""The process in which libllama quantizes: it may be killed, and may abort, without us.

``python -P -m so8tqc.llama.quantize_worker``, spoken to by ``llama.quantizer``: requests are lines
of JSON (:class:`so8tqc.llama.quantizer.Job`) on the standard input. libllama writes its own log to
the standard error; after each job a line with ``DONE_MARK`` follows it. It ends when its input
does, or with libllama's status after a job that fails.

It imports little, since its start is a third of the time in which libllama quantizes a small model.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from so8tqc.llama.light import light_bindings

if TYPE_CHECKING:
    from so8tqc.llama.imatrix import ImportanceMatrix

DONE_MARK = "so8tqc: done"
_OF_WRITING = {errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC}
_OF_OPENING = {errno.EACCES, errno.EPERM, errno.EROFS}
"""What the disk may refuse. That a file cannot be opened is no failure where libllama has none."""


def main() -> int:
    """Run ``llama_model_quantize`` for every job asked for; 0 on success of all."""
    lib = light_bindings()
    # the binding's import put a Python callback here; a null one means libllama's own printing
    lib.llama_log_set(lib.llama_log_callback(), ctypes.c_void_p(0))
    lib.llama_backend_init()
    for line in sys.stdin:
        if status := run(lib, json.loads(line)):
            return status
        print(DONE_MARK, file=sys.stderr, flush=True)
    return 0


def run(lib: Any, job: Mapping[str, Any]) -> int:
    """One job, by libllama's bindings; its status."""
    recipe = job["recipe"]
    parameters = lib.llama_model_quantize_default_params()
    parameters.ftype = recipe["file_type"]
    parameters.nthread = job["threads"] or 0
    parameters.pure = recipe["pure"]
    parameters.allow_requantize = recipe["requantize"]
    parameters.dry_run = job["destination"] is None
    if recipe["output_type"] is not None:
        parameters.output_tensor_type = recipe["output_type"]
    if recipe["embedding_type"] is not None:
        parameters.token_embedding_type = recipe["embedding_type"]
    if recipe["tensor_types"]:
        parameters.tt_overrides = _overrides(lib, recipe["tensor_types"])
    matrix = None if recipe["imatrix"] is None else _read(Path(recipe["imatrix"]))
    if matrix is not None:
        parameters.imatrix = _importance(lib, matrix)  # points into matrix, which must live as long
    refused = _errno()
    refused.value = 0
    status = int(
        lib.llama_model_quantize(
            os.fsencode(job["source"]),
            os.fsencode(job["destination"] or os.devnull),
            ctypes.byref(parameters),
        )
    )
    # a C++ stream says only that something failed, and nothing at all when its last bytes do
    if refused.value in (_OF_WRITING | _OF_OPENING if status else _OF_WRITING):
        print(f"error: {os.strerror(refused.value)}", file=sys.stderr, flush=True)
        return status or 1
    return status


def _errno() -> ctypes.c_int:
    """The C library's errno of this thread; elsewhere than on Linux a variable that stays 0."""
    try:
        locate = ctypes.CDLL(None).__errno_location
    except (AttributeError, TypeError):
        return ctypes.c_int(0)
    locate.restype = ctypes.POINTER(ctypes.c_int)
    found: ctypes.c_int = locate().contents
    return found


def _read(path: Path) -> ImportanceMatrix:
    from so8tqc.llama.imatrix import read_imatrix

    return read_imatrix(path)


def _overrides(lib: Any, pairs: Sequence[tuple[str, int]]) -> Any:
    """The array of structs libllama wants, ended by a null pattern."""
    array = (lib.llama_model_tensor_override * (len(pairs) + 1))()
    for entry, (pattern, type_) in zip(array, pairs, strict=False):
        entry.pattern, entry.type = pattern.encode(), type_
    return array


def _importance(lib: Any, matrix: ImportanceMatrix) -> Any:
    """The array of structs libllama wants, ended by a null name; the data stay the matrix's."""
    array = (lib.llama_model_imatrix_data * (len(matrix.means) + 1))()
    for entry, (name, means) in zip(array, matrix.means.items(), strict=False):
        entry.name = name.encode()
        entry.data = means.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = means.size
    return array


if __name__ == "__main__":
    sys.exit(main())
