"""How the libllama that is installed was compiled, and whether this CPU can run it.

ggml compiles its kernels for the CPU of the machine that builds it; what it says of itself
(``llama_print_system_info``) are the instruction sets that the compiler was told to use. On a CPU
without one of them a kernel ends the process (SIGILL), perhaps only for some tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

BUILD_MINUTES = "6 to 9 minutes on two cores"
"""Measured, with the flags of the noxfile."""

_FLAGS = {
    "SSE3": ("-msse3", "pni"),
    "SSSE3": ("-mssse3", "ssse3"),
    "AVX": ("-mavx", "avx"),
    "AVX_VNNI": ("-mavxvnni", "avx_vnni"),
    "AVX2": ("-mavx2", "avx2"),
    "F16C": ("-mf16c", "f16c"),
    "FMA": ("-mfma", "fma"),
    "BMI2": ("-mbmi2", "bmi2"),
    "AVX512": ("-mavx512f", "avx512f"),
    "AVX512_VBMI": ("-mavx512vbmi", "avx512vbmi"),
    "AVX512_VNNI": ("-mavx512vnni", "avx512_vnni"),
    "AVX512_BF16": ("-mavx512bf16", "avx512_bf16"),
    "AMX_INT8": ("-mamx-int8", "amx_int8"),
}
"""ggml's word → the compiler's flag, and the CPU's word in ``/proc/cpuinfo``."""

_AMX = "-mamx-int8"
_FIRST_SOUND_GCC = 14
"""GCC before it drops most of the tile configuration that ggml writes for AMX: its kernels die."""

_COMPILER = re.compile(rb"(GCC): \([^)\0]*\) (\d+)(?:\.\d+)*|(clang) version (\d+)")


@dataclass(frozen=True)
class Compiled:
    """A build.

    Attributes:
        flags: the instruction sets it was compiled for, as the compiler's flags.
        compiler: e.g. ``GCC 12``; "" if the library does not say.
        lacking: flags whose instructions this CPU does not have.
        broken: what is known to be wrong with such a build, "" if nothing is.
    """

    flags: tuple[str, ...]
    compiler: str
    lacking: tuple[str, ...]
    broken: str

    @property
    def trusted(self) -> bool:
        """Whether it can be trusted on this CPU."""
        return not self.lacking and not self.broken


def compiled(system_info: str, library: bytes, cpu: Iterable[str]) -> Compiled:
    """What a build says of itself, beside what the CPU has.

    Args:
        system_info: of ``llama_print_system_info``.
        library: the bytes of the library that holds the CPU's kernels.
        cpu: the words of ``/proc/cpuinfo``; none where there is no such file.
    """
    known = set(cpu)
    said = re.findall(r"(\w+) = (\d+)", system_info)
    used = [_FLAGS[word] for word, value in said if value != "0" and word in _FLAGS]
    name, version = _compiler(library)
    broken = ""
    if _AMX in [flag for flag, _ in used] and name == "GCC" and version < _FIRST_SOUND_GCC:
        broken = f"AMX kernels compiled by GCC {version} end the process (SIGILL)"
    return Compiled(
        flags=tuple(flag for flag, _ in used),
        compiler=f"{name} {version}" if name else "",
        lacking=tuple(flag for flag, word in used if known and word not in known),
        broken=broken,
    )


def _compiler(library: bytes) -> tuple[str, int]:
    found = _COMPILER.search(library)
    if found is None:
        return "", 0
    name, version = (found[1], found[2]) if found[1] else (found[3], found[4])
    return name.decode(), int(version)


def cpu_words(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the CPU can do, in Linux' words; none on other systems."""
    try:
        return frozenset(path.read_text(encoding="utf-8").split())
    except OSError:
        return frozenset()
