"""The parts of the compiled kernels that are not seen through a token's statistics."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from so8tqc.metrics import cpu_kernels as kernels


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 60, reason="longdouble is float64 here")
def test_the_exponential_is_good_to_its_last_digit() -> None:
    generator = np.random.default_rng(0)
    edges = [0.0, -0.0, -1e-300, -1e-17, -0.5 * np.log(2), -1.5 * np.log(2), -707.999, -708.0]
    for x in (*edges, *generator.uniform(-708, 0, 2000), *-generator.exponential(0.1, 2000)):
        exact = np.exp(np.longdouble(x))
        assert abs(kernels.exponential(x) - exact) <= np.spacing(float(exact)), x


@pytest.mark.parametrize("x", [-708.1, -745.0, -1e5, -1e30, -1e308, -np.inf])
def test_where_the_exponential_underflows_it_is_zero(x: float) -> None:
    assert kernels.exponential(x) == 0.0


def test_the_exponential_of_no_number_is_none() -> None:
    assert np.isnan(kernels.exponential(np.nan))


PROGRAM = """
import torch
from so8tqc.metrics.distributions import distribution
print(distribution(torch.tensor([[0.0, 0.0]]), torch.tensor([0])).numbers[0, 1])
"""


def nll_of_a_coin(program: str = PROGRAM, **environment: str) -> float:
    """Compute a row in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_where_no_folder_keeps_them_kernels_are_compiled_all_the_same() -> None:
    nowhere = {"NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator", "NUMBA_CACHE_DIR": ""}
    assert nll_of_a_coin(**nowhere) == pytest.approx(np.log(2))


def test_a_full_disk_or_a_broken_file_only_costs_compiling(tmp_path: Path) -> None:
    full = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n" + PROGRAM
    assert nll_of_a_coin(full, NUMBA_CACHE_DIR=str(tmp_path)) == pytest.approx(np.log(2))
    assert not list(tmp_path.rglob("*.nbc"))
    assert nll_of_a_coin(NUMBA_CACHE_DIR=str(tmp_path)) == pytest.approx(np.log(2))
    (file,) = tmp_path.rglob("*.nbc")
    whole = file.read_bytes()
    for kept in (0, 100):
        file.write_bytes(whole[:kept])
        assert nll_of_a_coin(NUMBA_CACHE_DIR=str(tmp_path)) == pytest.approx(np.log(2))
    file.write_bytes(whole)
    (index,) = tmp_path.rglob("*.nbi")
    whole = index.read_bytes()
    other = bytearray(whole)
    other[len(whole) // 2] ^= 0x80
    for damaged in (whole[:-9], other):
        index.write_bytes(damaged)
        assert nll_of_a_coin(NUMBA_CACHE_DIR=str(tmp_path)) == pytest.approx(np.log(2))
