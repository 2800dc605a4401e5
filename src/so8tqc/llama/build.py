"""Which libllama this is: on another build or CPU a quantization may differ in the last bits."""

from __future__ import annotations

import hashlib
from pathlib import Path

from so8tqc.disk.digests import sha256_file
from so8tqc.llama.libllama import library
from so8tqc.record_kinds.quantize import Build
from so8tqc.records import versions

_LIBRARIES = ("*llama.*", "*ggml*")


def library_build() -> Build:
    """The libllama that is loaded here.

    Raises:
        MissingToolError: there is none.
    """
    lib = library()
    folder = Path(lib._lib._name).parent  # ctypes' name of a library is its path
    files = {path.resolve() for pattern in _LIBRARIES for path in folder.glob(pattern)}
    digests = sorted({sha256_file(path) for path in files})
    return Build(
        version=versions("llama-cpp-python")["llama-cpp-python"],
        libraries=hashlib.sha256("\n".join(digests).encode()).hexdigest(),
        cpu=lib.llama_print_system_info().decode().strip(" |"),
    )
