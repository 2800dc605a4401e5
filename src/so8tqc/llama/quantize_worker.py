"""The process in which libllama quantizes: it may be killed, and may abort, without us.

``python -P -m so8tqc.llama.quantize_worker SOURCE DESTINATION FILE_TYPE THREADS [IMATRIX]``

libllama writes its own log to the standard error; the exit status is its result.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

from so8tqc.llama.imatrix import ImportanceMatrix, read_imatrix
from so8tqc.llama.libllama import bindings


def main(
    source: str, destination: str, file_type: str, threads: str, imatrix: str | None = None
) -> int:
    """Run ``llama_model_quantize``; 0 on success."""
    lib = bindings()
    # the binding's import put a Python callback here; a null one means libllama's own printing
    lib.llama_log_set(lib.llama_log_callback(), ctypes.c_void_p(0))
    lib.llama_backend_init()
    parameters = lib.llama_model_quantize_default_params()
    parameters.ftype = int(file_type)
    parameters.nthread = int(threads)
    matrix = read_imatrix(Path(imatrix)) if imatrix is not None else None
    if matrix is not None:
        parameters.imatrix = _entries(lib, matrix)  # points into matrix, which must live as long
    return int(
        lib.llama_model_quantize(
            os.fsencode(source), os.fsencode(destination), ctypes.byref(parameters)
        )
    )


def _entries(lib: Any, matrix: ImportanceMatrix) -> Any:
    """The array of structs libllama wants, ended by a null name; the data stay the matrix's."""
    array = (lib.llama_model_imatrix_data * (len(matrix.means) + 1))()
    for entry, (name, means) in zip(array, matrix.means.items(), strict=False):
        entry.name = name.encode()
        entry.data = means.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = means.size
    return array


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
