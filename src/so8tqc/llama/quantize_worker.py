"""The process in which libllama quantizes: it may be killed, and may abort, without us.

``python -P -m so8tqc.llama.quantize_worker JOB…`` (JSON of :class:`so8tqc.llama.quantizer.Job`)

libllama writes its own log to the standard error; the exit status is its result.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from so8tqc.llama.imatrix import ImportanceMatrix, read_imatrix
from so8tqc.llama.libllama import bindings
from so8tqc.llama.quantizer import RECIPE_MARK


def main(jobs: Sequence[str]) -> int:
    """Run ``llama_model_quantize`` for every job; 0 on success of all."""
    lib = bindings()
    # the binding's import put a Python callback here; a null one means libllama's own printing
    lib.llama_log_set(lib.llama_log_callback(), ctypes.c_void_p(0))
    lib.llama_backend_init()
    for number, text in enumerate(jobs):
        print(RECIPE_MARK, number, sep="", file=sys.stderr, flush=True)
        if status := _quantize(lib, json.loads(text)):
            return status
    return 0


def _quantize(lib: Any, job: Mapping[str, Any]) -> int:
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
    matrix = None if recipe["imatrix"] is None else read_imatrix(Path(recipe["imatrix"]))
    if matrix is not None:
        parameters.imatrix = _importance(lib, matrix)  # points into matrix, which must live as long
    return int(
        lib.llama_model_quantize(
            os.fsencode(job["source"]),
            os.fsencode(job["destination"] or os.devnull),
            ctypes.byref(parameters),
        )
    )


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
    sys.exit(main(sys.argv[1:]))
