"""What the GPU's kernels say of logits is what the CPU's float64 says of the same logits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from so8tqc.errors import DataError
from so8tqc.metrics.columns import COLUMNS
from so8tqc.metrics.distributions import distribution
from so8tqc.metrics.divergence import token_rows
from so8tqc.metrics.gpu_divergence import gpu_distribution, gpu_token_rows, works_on
from so8tqc.sources.compare import compare
from so8tqc.sources.protocol import EncodedText, TokenIds

pytestmark = pytest.mark.gpu

RELATIVE, ABSOLUTE = 1e-9, 1e-12
"""Stated tolerance: float64 on both sides, summed in another order."""


def rows(reference: torch.Tensor, candidate: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    sides = [distribution(logits, targets) for logits in (reference, candidate)]
    return token_rows(*sides).numpy()


def rows_there(
    reference: torch.Tensor, candidate: torch.Tensor, targets: torch.Tensor
) -> np.ndarray:
    goal = targets.cuda()
    sides = [gpu_distribution(logits.cuda(), goal) for logits in (reference, candidate)]
    return gpu_token_rows(*sides, goal).cpu().numpy()


def test_the_kernels_run_here() -> None:
    assert works_on(torch.device("cuda:0"))
    assert not works_on(torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [3, 40, 2048, 5001, 49_152, 262_144])
@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-4, 0.02, 0.5, 3.0, 200.0])
def test_every_column_is_the_cpus(vocabulary: int, noise: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    z = torch.randn(5, vocabulary, generator=generator, dtype=torch.float64) * 4
    w = z + noise * torch.randn(5, vocabulary, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (5,), generator=generator)
    expected = rows(z.to(dtype), w.to(dtype), targets)
    got = rows_there(z.to(dtype), w.to(dtype), targets)
    for i, name in enumerate(COLUMNS):
        np.testing.assert_allclose(
            got[:, i], expected[:, i], rtol=RELATIVE, atol=ABSOLUTE, err_msg=name
        )


@pytest.mark.parametrize("noise", [1e-7, 1e-5, 1e-3])
def test_small_divergences_have_digits(noise: float) -> None:
    """KL of 1e-14 and less, relatively: the absolute tolerance above would not see it."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(4, 50_000, generator=generator, dtype=torch.float64) * 3
    w = z + noise * torch.randn(4, 50_000, generator=generator, dtype=torch.float64)
    targets = torch.zeros(4, dtype=torch.int64)
    expected, got = rows(z, w, targets), rows_there(z, w, targets)
    for name in ("kl", "kl_reverse", "js"):
        i = COLUMNS.index(name)
        assert (expected[:, i] < noise**2).all()
        np.testing.assert_allclose(got[:, i], expected[:, i], rtol=1e-7, err_msg=name)


class OnGpu:
    """Logits from memory, on the GPU."""

    def __init__(self, name: str, logits: list[torch.Tensor]) -> None:
        self.name = name
        self._logits = logits
        self.vocab_size = logits[0].shape[1]

    def logits(self, tokens: TokenIds, rows: int, first: int = 0) -> Iterator[torch.Tensor]:
        yield from self._logits[int(tokens[0])][first:].split(rows)

    def close(self) -> None:
        pass


def world(device: str) -> tuple[list[OnGpu], list[EncodedText]]:
    generator = torch.Generator().manual_seed(0)
    lengths = (3, 200, 129, 2)
    texts = [EncodedText(f"t{i}", np.r_[i, np.arange(n - 1)]) for i, n in enumerate(lengths)]
    sources = [
        OnGpu(name, [torch.randn(n, 300, generator=generator).to(device) for n in lengths])
        for name in ("a", "b")
    ]
    return sources, texts


@pytest.mark.parametrize("devices", [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
def test_a_comparison_is_the_cpus_wherever_the_logits_are(devices: tuple[str, str]) -> None:
    here, texts = world("cpu")
    there = [world(device)[0][i] for i, device in enumerate(devices)]
    (expected,) = compare(here, [("a", "b")], texts).values()
    (got,) = compare(there, [("a", "b")], texts).values()
    for name, values in expected.columns.items():
        np.testing.assert_allclose(got.columns[name], values, rtol=RELATIVE, atol=ABSOLUTE)
    np.testing.assert_array_equal(got.position, expected.position)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_named(value: float) -> None:
    sources, texts = world("cuda")
    sources[1]._logits[1][150, 7] = value
    sources[1]._logits[1][150, 9] = value
    with pytest.raises(
        DataError, match=r"t1: b yields a non-finite logit at position 150, token 7"
    ):
        compare(sources, [("a", "b")], texts)
