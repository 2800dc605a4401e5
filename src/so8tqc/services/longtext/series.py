"""``series.npz``: what was measured along each text, and what the plots need of it.

``CASE/COLUMN`` and ``CASE/position`` [tokens], the columns being those of the token table;
``CASE/attention_entropy`` [layers, T], mean over heads, nats; ``CASE/spectrum_FIELD`` [F], the
spectrum of its mean over layers (period in tokens, power, p_value, significant);
``CASE/generated_WRITER`` token ids. What is the reference's ends in ``_reference``.
``rope_wavelengths`` are the model's, tokens.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from so8tqc.disk.atomic import atomic_file
from so8tqc.disk.foreign import require_plain_file
from so8tqc.errors import InputError
from so8tqc.metrics.spectra import Spectrum

SERIES_FILE = "series.npz"
SHOWN = (
    "max_logit_candidate",
    "max_logit_reference",
    "entropy_candidate",
    "entropy_reference",
    "kl",
)
"""Columns that are drawn."""

_SUFFIXES = {"candidate": "", "reference": "_reference"}
_FIELDS = tuple(field.name for field in fields(Spectrum))
_WAVELENGTHS = "rope_wavelengths"
_MAX_BYTES = 2 << 30
"""Of the unpacked arrays: a hundred texts of 100,000 tokens each."""

FloatArray = npt.NDArray[np.float64]
Arrays = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class CaseSeries:
    """What is drawn of one text.

    Attributes:
        columns: name → [tokens], the names of ``SHOWN``.
        position: [tokens] of the predicting tokens.
        attention: [layers, T] of the candidate, nats; None if unknown.
        spectra: ``candidate`` and ``reference``, as far as known.
    """

    columns: Mapping[str, FloatArray]
    position: npt.NDArray[np.integer]
    attention: FloatArray | None
    spectra: Mapping[str, Spectrum]


def spectrum_arrays(name: str, spectrum: Spectrum) -> Arrays:
    """Key within its case → array, of the spectrum of ``candidate`` or ``reference``."""
    return {f"spectrum_{f}{_SUFFIXES[name]}": getattr(spectrum, f) for f in _FIELDS}


def attention_key(name: str) -> str:
    """Where a case keeps the attention entropy of ``candidate`` or ``reference``."""
    return f"attention_entropy{_SUFFIXES[name]}"


def write_series(path: Path, cases: Mapping[str, Arrays], wavelengths: FloatArray) -> None:
    """Write the arrays of every case, by its id, as one npz.

    Raises:
        ToolError: the disk refuses.
    """
    arrays: Arrays = {_WAVELENGTHS: wavelengths}
    for case, series in cases.items():
        arrays |= {f"{case}/{key}": values for key, values in series.items()}
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def read_series(path: Path, ids: Iterable[str]) -> tuple[dict[str, CaseSeries], FloatArray]:
    """What is drawn of these cases, and the model's wavelengths.

    Raises:
        InputError: no such file, or not one that :func:`write_series` of this version wrote.
    """
    require_plain_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
            _require(size <= _MAX_BYTES, f"unpacks to more than {_MAX_BYTES >> 20} MiB")
        with np.load(path, allow_pickle=False) as stored:
            return {case: _case(stored, case) for case in ids}, _vector(stored, _WAVELENGTHS)
    except Exception:  # noqa: BLE001  numpy, zipfile and zlib each fail in their own ways
        raise InputError(
            "no series of these texts, or not of this version",
            where=str(path),
            remedy="Run the stage again.",
        ) from None


def _case(stored: Mapping[str, npt.NDArray[np.generic]], case: str) -> CaseSeries:
    columns = {name: _vector(stored, f"{case}/{name}") for name in SHOWN}
    position = np.asarray(stored[f"{case}/position"])
    _require(position.dtype.kind == "i", "a position that is no integer")
    sizes = {values.shape for values in (position, *columns.values())}
    _require(len(sizes) == 1 and position.size > 0, "columns of different lengths")
    key = f"{case}/{attention_key('candidate')}"
    attention = np.asarray(stored[key], dtype=np.float64) if key in stored else None
    _require(attention is None or (attention.ndim == 2 and attention.size > 0), "a broken heat map")
    spectra = {
        name: _spectrum(stored, case, suffix)
        for name, suffix in _SUFFIXES.items()
        if f"{case}/spectrum_period{suffix}" in stored
    }
    return CaseSeries(columns, position, attention, spectra)


def _spectrum(stored: Mapping[str, npt.NDArray[np.generic]], case: str, suffix: str) -> Spectrum:
    period, power, p_value = (
        _vector(stored, f"{case}/spectrum_{f}{suffix}") for f in ("period", "power", "p_value")
    )
    significant = np.asarray(stored[f"{case}/spectrum_significant{suffix}"], dtype=np.bool_)
    sizes = {values.shape for values in (period, power, p_value, significant)}
    _require(len(sizes) == 1, "a spectrum of different lengths")
    return Spectrum(period, power, p_value, significant)


def _vector(stored: Mapping[str, npt.NDArray[np.generic]], key: str) -> FloatArray:
    values = np.asarray(stored[key])
    _require(values.ndim == 1 and values.dtype.kind == "f", f"{key} is no series of numbers")
    return values.astype(np.float64)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
