"""A tensor's fold, piece by piece, against a dense product in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import block_diag, expm

from so8tqc.checkpoints import baking
from so8tqc.checkpoints.baking import TensorFold
from so8tqc.checkpoints.plan import PlannedTensor
from so8tqc.checkpoints.safetensors_index import TensorEntry
from so8tqc.checkpoints.sites import TensorSite
from so8tqc.errors import ModelError, RotationError
from so8tqc.progress import SILENT
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.rotation_set import RotationSet, Target

TARGET = Target(0)
WIDTH = 24  # of the side that is rotated; the other is 16
NAME = "layers.0.self_attn.o_proj.weight"


def rotations(site: Site) -> RotationSet:
    skew = np.random.default_rng(0).normal(size=(WIDTH // 8, 8, 8)) * 0.3
    blocks = np.stack([expm(a - a.T) for a in skew])
    return RotationSet(
        {TARGET: blocks}, Convention.COLUMN, site, Parametrization.MATRIX, source="test"
    )


def pieces(stored: torch.Tensor, site: Site, *, transposed: bool) -> list[torch.Tensor]:
    entry = TensorEntry(NAME, Path("model.safetensors"), "F32", tuple(stored.shape), 0, 0)
    planned = PlannedTensor(TensorSite(TARGET, NAME, None, transposed), entry, "F16")
    with SILENT.task("baking") as task:
        return list(TensorFold(planned, lambda: rotations(site), task).pieces(stored))


def stored_weight(site: Site, *, transposed: bool) -> torch.Tensor:
    shape = (16, WIDTH) if (site is Site.INPUT) != transposed else (WIDTH, 16)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def expected(stored: torch.Tensor, site: Site, *, transposed: bool) -> np.ndarray:
    """W·R at the input, R·W at the output, in the layout it was stored in."""
    weight = stored.double().numpy().T if transposed else stored.double().numpy()
    dense = block_diag(*rotations(site).blocks[TARGET])
    folded = weight @ dense if site is Site.INPUT else dense @ weight
    return folded.T if transposed else folded


@pytest.mark.parametrize("chunk", [1, 16, 200, 1 << 18])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("site", [Site.INPUT, Site.OUTPUT])
def test_pieces_are_whole_rows_of_the_fold_in_order(
    site: Site, transposed: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baking, "CHUNK_ELEMENTS", chunk)
    stored = stored_weight(site, transposed=transposed)
    parts = pieces(stored, site, transposed=transposed)
    assert all(part.is_contiguous() and part.dtype is torch.float16 for part in parts)
    assert (len(parts) > 1) == (chunk < stored.numel())
    np.testing.assert_array_equal(
        torch.cat(parts).numpy(), expected(stored, site, transposed=transposed).astype(np.float16)
    )


@pytest.mark.parametrize("chunk", [1, 1 << 18])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("site", [Site.INPUT, Site.OUTPUT])
@pytest.mark.parametrize(
    ("value", "error", "says"),
    [(1e6, RotationError, "does not fit"), (float("nan"), ModelError, "NaN or an infinity")],
)
def test_what_stops_a_fold_is_named_by_its_place_in_the_stored_tensor(
    value: float,
    error: type[Exception],
    says: str,
    site: Site,
    transposed: bool,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(baking, "CHUNK_ELEMENTS", chunk)
    stored = stored_weight(site, transposed=transposed)
    stored[13, 9] = value
    with pytest.raises(error, match=says) as told:
        pieces(stored, site, transposed=transposed)
    assert NAME in str(told.value)
    row, column = (
        int(part) for part in str(told.value).split("element [")[1].split("]")[0].split(",")
    )
    if error is ModelError:
        assert (row, column) == (13, 9)
    else:
        assert abs(expected(stored, site, transposed=transposed)[row, column]) > 65504
