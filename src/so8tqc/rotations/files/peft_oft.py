"""PEFT OFT adapters: what PEFT's own forward computes, in float64.

PEFT multiplies ``x_row @ R`` on blocks of the input features: convention ``row``, site
``input``. Its parameter is the strict upper triangle of a skew Q, row by row: [N, b(b−1)/2].

* Exact Cayley: R = (I − Q)(I + Q)⁻¹. With A = −2Q this is (I − A/2)⁻¹(I + A/2), our ``cayley``
  of θ = −2·triu(Q) (numerator and denominator commute).
* Cayley–Neumann (``use_cayley_neumann``): the truncated series of (I + Q)(I − Q)⁻¹, which is
  the *inverse* rotation: I + 2Q + 2Q² + … + Q^m. Its last term has weight 1 since PEFT 0.18 and
  had weight 2 before. A truncated series is not orthogonal; the drift grows like 2‖Q⁴‖.
* ``coft`` bounds ‖Q‖ before either; ``block_share`` repeats one block along the features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from so8tqc.architectures import in_other_tower
from so8tqc.disk.foreign import require_safetensors_header
from so8tqc.errors import ConfigError, RotationError
from so8tqc.rotations import double_double as dd
from so8tqc.rotations.double_double import DoubleDouble
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.peft_config import AS_TRAINED, CONFIG_NAME, number, read_config
from so8tqc.rotations.files.raw import RawRotations
from so8tqc.rotations.parametrization import rotation_blocks
from so8tqc.rotations.rotation_set import (
    ORTHOGONALITY_LIMIT,
    FloatArray,
    Target,
    orthogonality_error,
)

WEIGHTS_NAME = "adapter_model.safetensors"
HALVED_LAST_TERM_SINCE = (0, 18)
"""First PEFT version whose Cayley–Neumann series ends with Q^m instead of 2·Q^m."""

_KEY = re.compile(
    r"^(?P<prefix>(?:.+?\.)?)(?:layers|h|blocks)\.(?P<layer>\d+)\."
    r"(?P<module>.+)\.oft_R\.(?:[^.]+\.)?weight$"
)
_DEFAULT_TERMS = 5
_MOST_TERMS = 1000
"""Of a series that is of use only where ‖Q‖ < 1; PEFT's default is 5."""

_DEFAULT_EPS = 6e-5


def is_adapter(path: Path) -> bool:
    """Whether a path looks like a PEFT adapter directory."""
    return path.is_dir() and (path / CONFIG_NAME).is_file()


def read_oft(directory: Path) -> RawRotations:
    """Read an OFT adapter.

    Returns:
        ``cayley`` with theta for the exact transform, else ``matrix`` with PEFT's own blocks.

    Raises:
        RotationError: not OFT; anything in it that is no OFT rotation (biases, modules to save,
            LoRA parts, convolutions, settings not understood), by name; unreadable files.
        ConfigError: it does not record which of its two transforms was trained.
    """
    config = read_config(directory)
    if not (directory / WEIGHTS_NAME).is_file():
        raise RotationError(f"{WEIGHTS_NAME} is not here", where=str(directory), remedy=AS_TRAINED)
    vectors = _vectors(directory / WEIGHTS_NAME)
    skew = {target: _skew(vector, f"{directory}, {target}") for target, vector in vectors.items()}
    notices = _size_notices(config, skew, directory)
    if config.get("coft"):
        eps = number(config, "eps", _DEFAULT_EPS, directory)
        skew = {target: _constrained(q, eps) for target, q in skew.items()}
    if _neumann(config, directory):
        theta = _series(config, skew, notices, directory)
        parametrization = Parametrization.MATRIX
    else:
        theta = {target: -2.0 * np.triu(q, 1) for target, q in skew.items()}
        parametrization = Parametrization.CAYLEY
    shared = bool(config.get("block_share"))
    if shared:
        _require_one_block(theta, directory)
    return RawRotations(
        theta=theta,
        parametrization=parametrization,
        convention=Convention.ROW,
        site=Site.INPUT,
        shared=shared,
        metadata={"source": "PEFT OFT", "peft_version": str(config.get("peft_version", "unknown"))},
        notices=tuple(notices),
    )


def oft_blocks(
    config: Mapping[str, Any], vector: FloatArray, directory: Path, where: str
) -> FloatArray:
    """R of one module as PEFT's forward computes it, [N, b, b]; orthogonal or not.

    Args:
        config: the adapter's.
        vector: [N, b(b−1)/2], ``oft_R`` of the module.
        directory: the adapter's, for messages.
        where: the module, for messages.

    Raises:
        RotationError: a shape that is no triangle, or settings that are no numbers.
    """
    target = Target(0, where)
    skew = {target: _skew(vector, where)}
    if config.get("coft"):
        eps = number(config, "eps", _DEFAULT_EPS, directory)
        skew = {target: _constrained(skew[target], eps)}
    if _neumann(config, directory):
        return _series(config, skew, [], directory)[target]
    theta = -2.0 * np.triu(skew[target], 1)
    return rotation_blocks(theta, Parametrization.CAYLEY)


def neumann_series(q: FloatArray, terms: int, last_term_halved: bool) -> FloatArray:
    """PEFT's truncated Cayley–Neumann series of skew Q: [N, b, b] → [N, b, b].

    With t terms: t = 1: I; t = 2: I + 2Q; else I + 2Q + 2Q² + 2Q³ + … The version with the
    halved last term always ends with a cubic or higher power of weight 1, Q^max(3, t−1);
    the older one ends with 2·Q^(t−1).
    """
    base = dd.from_blocks(q)
    one = dd.identity_like(base)
    if terms <= 1:
        return dd.to_blocks(one)
    total = dd.add(one, dd.scale(base, 2.0))
    if terms == 2:
        return dd.to_blocks(total)
    last = max(3, terms - 1) if last_term_halved else terms - 1
    power: DoubleDouble = base
    for exponent in range(2, last + 1):
        power = dd.matmul(power, base)
        weight = 1.0 if last_term_halved and exponent == last else 2.0
        total = dd.add(total, dd.scale(power, weight))
    return dd.to_blocks(total)


def _vectors(path: Path) -> dict[Target, FloatArray]:
    from safetensors import SafetensorError, safe_open

    require_safetensors_header(path, RotationError)
    vectors: dict[Target, FloatArray] = {}
    try:
        with safe_open(str(path), framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118
                target = _target(key, path)
                if target in vectors:
                    raise RotationError(f"two rotations for {target}", where=f"{path}, {key}")
                vectors[target] = handle.get_tensor(key).double().numpy()
    except (SafetensorError, OSError) as error:
        raise RotationError(f"not a readable safetensors file: {error}", where=str(path)) from None
    if not vectors:
        raise RotationError("the adapter holds no rotations", where=str(path))
    return vectors


def _target(key: str, path: Path) -> Target:
    match = _KEY.match(key)
    if match is None or in_other_tower(match["prefix"]):
        raise RotationError(
            f"{key!r} is no OFT rotation of a numbered text layer",
            where=str(path),
            remedy="Only adapters made of oft_R weights can be baked.",
        )
    return Target(int(match["layer"]), match["module"])


def _skew(vector: FloatArray, where: str) -> FloatArray:
    """[N, b(b−1)/2] → skew [N, b, b], strict upper triangle row by row."""
    if vector.ndim != 2 or 0 in vector.shape:
        raise RotationError(f"oft_R has shape {list(vector.shape)}, expected [N, k]", where=where)
    size = (1 + math.isqrt(1 + 8 * vector.shape[1])) // 2
    if size * (size - 1) // 2 != vector.shape[1]:
        raise RotationError(f"{vector.shape[1]} is no triangle of a square block", where=where)
    q = np.zeros((vector.shape[0], size, size))
    q[:, *np.triu_indices(size, 1)] = vector
    skew: FloatArray = q - q.transpose(0, 2, 1)
    return skew


def _constrained(q: FloatArray, eps: float) -> FloatArray:
    """COFT: ‖Q_k‖_F is at most eps/√N, as PEFT's forward enforces before every use.

    PEFT computes the limit in float32, as eps times the reciprocal of √N; so do we. (On
    some CPUs torch's own float32 √N is off by one unit in the last place.)
    """
    limit = float(np.float32(1) / np.sqrt(np.float32(q.shape[0])) * np.float32(eps))
    norm = dd.frobenius_norm(dd.from_blocks(q).hi)[:, None, None]
    constrained: FloatArray = np.where(norm <= limit, q, limit * (q / np.maximum(norm, limit)))
    return constrained


def _require_one_block(theta: Mapping[Target, FloatArray], directory: Path) -> None:
    for target, value in theta.items():
        if value.shape[0] != 1:
            raise RotationError(
                f"block_share means one block for all features, but {value.shape[0]} are stored",
                where=f"{directory}, {target}",
            )


def _neumann(config: Mapping[str, Any], directory: Path) -> bool:
    """Whether PEFT takes the truncated series, which turns the other way than the exact transform.

    Raises:
        ConfigError: the adapter does not record it.
    """
    if "use_cayley_neumann" not in config:
        raise ConfigError(
            "the adapter does not record use_cayley_neumann, and nothing is assumed: the truncated "
            "series turns the other way than the exact transform",
            where=str(directory / CONFIG_NAME),
            remedy='State in this file what it was trained with, "use_cayley_neumann": true or '
            "false (the PEFT release that trained it knows its default).",
        )
    return bool(config["use_cayley_neumann"])


def _series(
    config: Mapping[str, Any], skew: Mapping[Target, FloatArray], notices: list[str], path: Path
) -> dict[Target, FloatArray]:
    terms = number(config, "num_cayley_neumann_terms", _DEFAULT_TERMS, path)
    if not 0 <= terms <= _MOST_TERMS or terms != int(terms):
        raise RotationError(
            f"num_cayley_neumann_terms is {terms:g}, expected a whole number up to {_MOST_TERMS}",
            where=str(path / CONFIG_NAME),
        )
    halved, generation = _last_term_halved(config)
    blocks = {target: neumann_series(q, int(terms), halved) for target, q in skew.items()}
    drift = max(float(orthogonality_error(b).max()) for b in blocks.values())
    notices.append(f"{generation} As trained, its blocks drift by ‖RᵀR − I‖ ≤ {drift:.1e}.")
    return blocks


def _size_notices(
    config: Mapping[str, Any], skew: Mapping[Target, FloatArray], directory: Path
) -> list[str]:
    """PEFT changes a block size that does not divide the features; the tensors show it."""
    declared = number(config, "oft_block_size", 0, directory)
    other = sorted({q.shape[-1] for q in skew.values()} - {declared})
    if not declared or not other:
        return []
    sizes = ", ".join(map(str, other))
    return [f"The adapter declares blocks of {declared:g}, but PEFT made blocks of {sizes}."]


def _last_term_halved(config: Mapping[str, Any]) -> tuple[bool, str]:
    """Which generation of the series trained this adapter, and a notice that says so.

    PEFT records its version in the adapter since 0.18; without a record it is older.
    """
    recorded = config.get("peft_version")
    match = re.match(r"(\d+)\.(\d+)", str(recorded))
    if recorded is None or match is None:
        return False, (
            "The adapter records no PEFT version, so it was trained before 0.18: its "
            "Cayley–Neumann series ends with twice the last power."
        )
    halved = (int(match[1]), int(match[2])) >= HALVED_LAST_TERM_SINCE
    return halved, (
        f"Trained with PEFT {recorded}: its Cayley–Neumann series ends with "
        f"{'the last power once' if halved else 'twice the last power'}."
    )


def of_numbered_layers(keys: Iterable[str]) -> bool:
    """Whether all keys of an OFT adapter belong to numbered layers of the text model."""
    matches = [_KEY.match(key) for key in keys]
    return all(match is not None and not in_other_tower(match["prefix"]) for match in matches)


def within_orthogonality(directory: Path) -> bool:
    """Whether an OFT adapter's own R is orthogonal to the limit of a rotation, in every block.

    True as well where it cannot be read as OFT: reading it says why.
    """
    try:
        raw = read_oft(directory)
    except RotationError:
        return True
    if raw.parametrization is not Parametrization.MATRIX:
        return True
    return all(
        float(orthogonality_error(b).max()) <= ORTHOGONALITY_LIMIT for b in raw.theta.values()
    )
