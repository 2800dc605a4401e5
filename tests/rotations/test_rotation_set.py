"""A RotationSet is valid or does not exist."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from so8tqc.errors import ExitCode, RotationError
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.parametrization import rotation_blocks
from so8tqc.rotations.rotation_set import (
    ORTHOGONALITY_LIMIT,
    RotationSet,
    Target,
    orthogonality_error,
    rotation_angles,
)

BOTH = tuple(Convention)


def rotations(seed: int = 0, count: int = 3, size: int = 8) -> np.ndarray:
    theta = np.random.default_rng(seed).normal(size=(count, size, size))
    return rotation_blocks(theta, Parametrization.EXP)


def make(
    blocks: dict[Target, np.ndarray], convention: Convention = Convention.COLUMN
) -> RotationSet:
    return RotationSet(blocks, convention, Site.INPUT, Parametrization.EXP, "gates.pt")


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(RotationError, match=r"gates\.pt: contains no rotations"):
        make({})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.eye(8), r"shape \[8, 8\]"),
        (np.zeros((2, 8, 4)), r"shape \[2, 8, 4\]"),
        (np.zeros((0, 8, 8)), r"shape \[0, 8, 8\]"),
        (np.eye(8, dtype=np.float32)[None], "float32, expected float64"),
        (np.stack([np.eye(8), np.full((8, 8), np.nan)]), "block 1 has a non-finite"),
        (np.stack([np.eye(8), np.eye(8) * 1.001]), "block 1 is not orthogonal"),
        (np.stack([np.eye(8), np.diag([-1.0] + [1.0] * 7)]), "block 1 is a reflection"),
    ],
)
def test_blocks_that_are_no_rotations_are_refused(bad: np.ndarray, message: str) -> None:
    with pytest.raises(RotationError, match=message) as caught:
        make({Target(0): np.eye(8)[None], Target(5): bad})
    assert "gates.pt, layer 5" in str(caught.value)
    assert caught.value.exit_code == ExitCode.BAD_INPUT


def test_drift_up_to_the_limit_is_accepted() -> None:
    # (1 + e)·I has ‖RᵀR − I‖_F = (2e + e²)·√8
    e = ORTHOGONALITY_LIMIT / (2 * np.sqrt(8))
    make({Target(0): np.eye(8)[None] * (1 + 0.99 * e)})
    with pytest.raises(RotationError, match="not orthogonal"):
        make({Target(0): np.eye(8)[None] * (1 + 1.01 * e)})


def test_it_is_ordered_by_layer_and_immutable() -> None:
    block = np.eye(8)[None]
    targets = [Target(10), Target(2), Target(2, "self_attn.q_proj")]
    got = make(dict.fromkeys(targets, block))
    assert list(got) == [Target(2), Target(2, "self_attn.q_proj"), Target(10)]
    assert got.layers == (2, 10)
    assert len(got) == 3
    with pytest.raises(TypeError):
        got.blocks[Target(9)] = block  # type: ignore[index]
    with pytest.raises(AttributeError):
        got.site = Site.OUTPUT  # type: ignore[misc]


@pytest.mark.parametrize("convention", BOTH)
def test_column_blocks_are_what_the_gate_does_to_a_column_vector(convention: Convention) -> None:
    r, x = rotations(), np.random.default_rng(1).normal(size=(3, 8))
    gate = [x[k] @ r[k] if convention is Convention.ROW else r[k] @ x[k] for k in range(3)]
    c = make({Target(0): r}, convention).column_blocks(Target(0))
    np.testing.assert_allclose(np.einsum("nij,nj->ni", c, x), np.stack(gate), atol=1e-15)


def test_the_fingerprint_sees_every_bit_and_the_words() -> None:
    r = rotations()
    other = r.copy()
    other[2, 7, 7] = np.nextafter(other[2, 7, 7], 2.0)
    prints = [
        make({Target(0): r}).fingerprint,
        make({Target(0): other}).fingerprint,
        make({Target(1): r}).fingerprint,
        make({Target(0, "self_attn.q_proj"): r}).fingerprint,
        make({Target(0): r}, Convention.ROW).fingerprint,
        RotationSet(
            {Target(0): r}, Convention.COLUMN, Site.OUTPUT, Parametrization.EXP, "gates.pt"
        ).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert make({Target(0): r.copy()}).fingerprint == prints[0]
    two = {Target(0): r, Target(1): other}
    assert make(two).fingerprint == make(dict(reversed(two.items()))).fingerprint


@settings(max_examples=25, deadline=None)
@given(angles=st.lists(st.floats(0.01, 3.1), min_size=4, max_size=4), seed=st.integers(0, 999))
def test_angles_are_found_in_any_basis(angles: list[float], seed: int) -> None:
    planes = np.zeros((8, 8))
    for k, angle in enumerate(angles):
        c, s = np.cos(angle), np.sin(angle)
        planes[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = [[c, -s], [s, c]]
    basis = rotations(seed, 1)[0]
    found = np.sort(rotation_angles((basis @ planes @ basis.T)[None])[0])
    np.testing.assert_allclose(found, np.sort(np.repeat(angles, 2)), atol=1e-6)


def test_orthogonality_error_is_the_frobenius_norm_per_block() -> None:
    blocks = np.stack([np.eye(8), np.diag([2.0] + [1.0] * 7)])
    np.testing.assert_allclose(orthogonality_error(blocks), [0, 3])
