"""Whether a build of libllama can be trusted on a CPU."""

from __future__ import annotations

import pytest

from so8tqc.llama.compiled import compiled

INFO = "CPU : SSE3 = 1 | AVX2 = 1 | AVX512 = 1 | AMX_INT8 = 0 | LLAMAFILE = 1 | OPENMP = 1 |"
GCC12 = b"\0GCC: (Debian 12.2.0-14) 12.2.0\0"
CPU = ("pni", "avx2", "avx512f", "amx_int8")


def test_a_build_for_this_cpu_is_trusted() -> None:
    build = compiled(INFO, GCC12, CPU)
    assert build.trusted
    assert build.flags == ("-msse3", "-mavx2", "-mavx512f")
    assert build.compiler == "GCC 12"


@pytest.mark.parametrize("gone", ["pni", "avx2", "avx512f"])
def test_a_build_for_another_cpu_is_not(gone: str) -> None:
    build = compiled(INFO, GCC12, [word for word in CPU if word != gone])
    assert not build.trusted
    assert len(build.lacking) == 1


@pytest.mark.parametrize(
    ("compiler", "trusted"),
    [(GCC12, False), (b"GCC: (GNU) 14.1.0", True), (b"clang version 17.0.1", True), (b"", True)],
)
def test_amx_by_an_old_gcc_is_not(compiler: bytes, trusted: bool) -> None:
    build = compiled(INFO.replace("AMX_INT8 = 0", "AMX_INT8 = 1"), compiler, CPU)
    assert build.trusted == trusted
    assert ("SIGILL" in build.broken) == (not trusted)


def test_where_nothing_is_known_of_the_cpu_nothing_is_held_against_it() -> None:
    assert compiled(INFO, GCC12, ()).trusted
