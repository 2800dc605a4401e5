"""Whether quantizers fuse products and sums is seen on what they store."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from so8tqc.llama import fused
from so8tqc.llama.pin import INSTALL_UNFUSED, UNFUSED


def test_the_sample_is_the_same_everywhere() -> None:
    sample = fused._sample(1024)
    assert sample.dtype == np.float32
    assert abs(float(sample.mean())) < 0.01
    assert 0.02 < float(sample.std()) < 0.1
    assert hashlib.sha256(sample.tobytes()).hexdigest().startswith("29443bbd9eecf7de")


@pytest.mark.llama
def test_these_quantizers_round_as_written() -> None:
    """As ``nox`` builds them, and as a stock build for plain x86-64 does."""
    pytest.importorskip("llama_cpp")
    assert not fused.quantizers_fuse()


@pytest.mark.llama
def test_one_block_rounded_otherwise_is_seen(tmp_path: Path) -> None:
    """A library whose quantizers are ggml's, but for the last bit of one scale."""
    pytest.importorskip("llama_cpp")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    from so8tqc.llama.ggml import ggml

    real = ctypes.cast(ggml().ggml_quantize_chunk, ctypes.c_void_p).value
    source = tmp_path / "other.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdint.h>\n"
        "typedef size_t (*chunk)(int, const float *, void *, int64_t, int64_t, int64_t, "
        "const float *);\n"
        "size_t ggml_quantize_chunk(int type, const float *from, void *to, int64_t start, "
        "int64_t rows, int64_t columns, const float *importance) {\n"
        f"  size_t size = ((chunk){real}ULL)(type, from, to, start, rows, columns, importance);\n"
        "  ((unsigned char *)to)[size - 1] ^= 1;\n  return size;\n}\n"
    )
    made = tmp_path / "other.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(made), str(source)], check=True)
    assert fused.stored_digest(ctypes.CDLL(str(made))) != fused.AS_WRITTEN


def test_the_command_names_the_flag_for_both_languages() -> None:
    assert INSTALL_UNFUSED.count(UNFUSED) == 2
