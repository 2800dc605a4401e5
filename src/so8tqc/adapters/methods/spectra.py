"""SHiRA, FourierFT and WaveFT: few numbers, at places of the weight or of its spectrum.

* **SHiRA** (``shira/layer.py``): W plus a number at each of some places, which are saved.
* **FourierFT** (``fourierft/layer.py``): s·Re(ifft2(F)), F zero but for K places drawn from
  ``random_loc_seed``: ΔW_ij = Σ_k a_k·cos(2π·(u_k·i/M + v_k·j/N)) for M outputs and N inputs,
  a_k = s·f_k/(M·N). A cosine is no binary fraction, so no rational number can confirm a rounding.
  Cosines and sines of i/M and j/N of a turn are computed in double-double and rounded once, their
  products with a_k once more; a rounding is then exact for the sum of products of these numbers.
  They hold ΔW itself to 6·2⁻⁵³·Σ|a_k|, and that bound decides where both are nearer to a boundary
  than it. PEFT's float32 FFT is off by more.
* **WaveFT** (``waveft/layer.py``): the same places; their numbers as they are, times s, or (by
  default) an inverse wavelet transform of them. Haar's (``db1``, the default) takes four numbers to
  2 × 2 places, ½·(a ± h ± v ± d); filters of other families stand in no file of an adapter.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from so8tqc.adapters.files import array
from so8tqc.adapters.methods.context import Context, ModuleSteps
from so8tqc.adapters.methods.road import cos_sin
from so8tqc.adapters.patterns import AddPlaces, AddWaves, Places
from so8tqc.errors import RotationError, ShapeError
from so8tqc.rotations import double_double as dd
from so8tqc.rotations.rotation_set import FloatArray

_TURN = (6.283185307179586, 2.4492935982947064e-16)
"""2π as a sum of two float64 numbers."""

_HAAR = ("db1", "haar")


def shira(c: Context) -> ModuleSteps:
    """Steps of a SHiRA module.

    Raises:
        RotationError: a place twice, or outside of the weight.
    """
    c.only("shira_weight.weight", "shira_indices.weight")
    numbers, indices = c.take("shira_weight.weight"), c.tensor("shira_indices.weight")
    c.require("shira_weight", numbers.shape, (numbers.size,))
    c.require("shira_indices", tuple(indices.shape), (2, numbers.size))
    rows, columns = array(indices)  # Windows saves them as floating point
    inside = (rows >= 0) & (rows < c.shape.out) & (columns >= 0) & (columns < c.shape.into)
    whole = (rows == np.floor(rows)) & (columns == np.floor(columns))
    if not (inside & whole).all():
        raise RotationError(
            f"shira_indices name places outside of {c.shape.out} × {c.shape.into}", where=c.where
        )
    places = rows.astype(np.int64) * c.shape.into + columns.astype(np.int64)
    if len(np.unique(places)) != len(places):
        raise RotationError("shira_indices name a place twice", where=c.where)
    return ModuleSteps((_at(places, numbers, c.shape.into),), zero=not numbers.any())


def fourierft(c: Context) -> ModuleSteps:
    """Steps of a FourierFT module."""
    c.only("fourierft_spectrum.weight")
    spectrum = c.take("fourierft_spectrum.weight")
    rows, columns = _drawn(c, "fourierft_spectrum", spectrum)
    scale = c.setting("scaling", 150)
    amplitudes = spectrum * scale / (c.shape.out * c.shape.into)
    step = AddWaves(amplitudes, rows, columns, turns(c.shape.out), turns(c.shape.into))
    return ModuleSteps((step,), zero=not amplitudes.any())


def waveft(c: Context) -> ModuleSteps:
    """Steps of a WaveFT module.

    Raises:
        RotationError: a family of wavelets other than Haar's.
    """
    c.only("waveft_spectrum.weight")
    spectrum = c.take("waveft_spectrum.weight")
    rows, columns = _drawn(c, "waveft_spectrum", spectrum)
    scaled = spectrum * c.setting("scaling", 25)
    zero = not scaled.any()
    if not c.files.config.get("use_idwt", True):
        places = rows * c.shape.into + columns
        return ModuleSteps((_at(places, scaled, c.shape.into),), zero=zero)
    family = str(c.files.config.get("wavelet_family", "db1"))
    if family.lower() not in _HAAR:
        raise RotationError(
            f"the adapter is WAVEFT with wavelets {family!r}, whose filters stand in PEFT's code "
            "and not in the adapter, so that it cannot be baked from files",
            where=c.where,
            remedy="Merge it with PEFT first. Haar's (db1, the default) can be baked.",
        )
    places, numbers = _haar(rows, columns, scaled, c.shape.out, c.shape.into)
    return ModuleSteps((_at(places, numbers, c.shape.into),), zero=zero)


def turns(size: int) -> tuple[FloatArray, FloatArray]:
    """cos and sin of 2π·k/size for k < size, each rounded once: [size] and [size]."""
    return _turns(size)


@lru_cache(maxsize=16)
def _turns(size: int) -> tuple[FloatArray, FloatArray]:
    k = np.arange(size, dtype=np.float64)
    k[k > size / 2] -= size
    angle = dd.multiply(dd.from_float64(k), dd.DoubleDouble(*(np.full(size, t) for t in _TURN)))
    angle = dd.divide(angle, dd.from_float64(np.full(size, float(size))))
    cosine, sine = cos_sin(angle.hi)
    rest = dd.from_float64(angle.lo)
    turned = dd.add(cosine, dd.negate(dd.multiply(rest, sine)))
    return dd.to_float64(turned), dd.to_float64(dd.add(sine, dd.multiply(rest, cosine)))


def _drawn(c: Context, name: str, spectrum: FloatArray) -> tuple[Places, Places]:
    """Rows and columns of the spectrum's places, as PEFT draws them when it loads the adapter."""
    c.require(name, spectrum.shape, (spectrum.size,))
    size = c.shape.out * c.shape.into
    if not 0 < spectrum.size <= size:
        raise ShapeError(f"{name} has {spectrum.size} numbers for {size} places", where=c.where)
    seed = int(c.setting("random_loc_seed", 777))
    places = _first_places(size, seed, spectrum.size)
    return places // c.shape.into, places % c.shape.into


@lru_cache(maxsize=16)
def _first_places(size: int, seed: int, count: int) -> Places:
    generator = torch.Generator().manual_seed(seed)
    places: Places = torch.randperm(size, generator=generator)[:count].numpy().copy()
    return places


def _at(places: Places, numbers: FloatArray, width: int) -> AddPlaces:
    order = np.argsort(places)
    return AddPlaces(places[order], numbers[order], width)


def _haar(
    rows: Places, columns: Places, numbers: FloatArray, out: int, into: int
) -> tuple[Places, FloatArray]:
    """Places and numbers of the inverse transform of a spectrum [out, in].

    The spectrum is put into the middle of one of even size; its quarters are the averages, the
    differences of rows (top right), of columns (bottom left), and of both. What is made of it has
    that size, of which the middle is taken. Numbers that meet at a place are added in their order,
    in float64.
    """
    height, width = out + out % 2, into + into % 2
    down, low = np.divmod(rows + (height - out) // 2, height // 2)
    across, left = np.divmod(columns + (width - into) // 2, width // 2)
    places, values = [], []
    for i in (0, 1):
        for j in (0, 1):
            sign = np.where(across & i, -1.0, 1.0) * np.where(down & j, -1.0, 1.0)
            y = 2 * low + i - (height - out) // 2
            x = 2 * left + j - (width - into) // 2
            kept = (y >= 0) & (y < out) & (x >= 0) & (x < into)
            places.append((y * into + x)[kept])
            values.append((numbers * 0.5 * sign)[kept])
    where, index = np.unique(np.concatenate(places), return_inverse=True)
    sums = np.bincount(index.reshape(-1), np.concatenate(values), len(where))
    return where.astype(np.int64), sums.astype(np.float64)
