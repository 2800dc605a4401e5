"""Periodicity of a series: peaks of its periodogram that noise of its kind does not make.

The null hypothesis is red noise: an AR(1) process x_t = φ·x_{t−1} + ε_t with φ and the
variance of the series itself. Surrogates drawn from it give the distribution of the power at
every frequency; p-values are corrected for the number of frequencies looked at
(Benjamini and Hochberg, JRSS B 57, 1995).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from so8tqc.metrics.oscillation import detrended

FloatArray = npt.NDArray[np.float64]

FALSE_DISCOVERY_RATE = 0.05
SURROGATES = 400
SHORTEST_PERIOD, SHARE_OF_LONGEST = 3.0, 0.25
"""Periods looked at: from 3 tokens to a quarter of the text, below which a trend is no period."""

_FLAT = 1e-12  # a deviation that rounding alone leaves of a constant series

NAME_TOLERANCE = 0.1
"""A period is named after a RoPE wavelength if they are within ten per cent."""


@dataclass(frozen=True)
class Spectrum:
    """Periodogram of a detrended series.

    Attributes:
        period: [F] tokens.
        power: [F], relative to the series' variance (they sum to about 1 over all frequencies).
        p_value: [F] under red noise.
        significant: [F] after false-discovery control.
    """

    period: FloatArray
    power: FloatArray
    p_value: FloatArray
    significant: npt.NDArray[np.bool_]


def spectrum(series: FloatArray, *, seed: int, surrogates: int = SURROGATES) -> Spectrum:
    """Periodogram with a surrogate test at every frequency: [T] → Spectrum.

    The null power at a frequency is exponential with the mean that the surrogates have there
    (the periodogram of a Gaussian process), so that small p-values need no million
    surrogates.
    """
    x = detrended(series)
    scale = float(x.std())
    if scale <= _FLAT * float(np.abs(series).max()):
        x, scale = np.zeros_like(x), 1.0
    x = x / scale
    frequency = np.fft.rfftfreq(x.size)
    longest = SHARE_OF_LONGEST * x.size
    kept = (frequency > 1.0 / longest) & (frequency <= 1.0 / SHORTEST_PERIOD)
    power = _periodogram(x)[kept]
    null = _red_noise_power(x, seed, surrogates)[:, kept].mean(axis=0)
    p_value = np.exp(-power / np.maximum(null, np.finfo(float).tiny))
    return Spectrum(
        period=np.reciprocal(frequency[kept]).astype(np.float64),
        power=power,
        p_value=p_value,
        significant=benjamini_hochberg(p_value, FALSE_DISCOVERY_RATE),
    )


def benjamini_hochberg(p_values: FloatArray, rate: float) -> npt.NDArray[np.bool_]:
    """Which hypotheses are rejected at a false discovery rate: [m] → [m]."""
    order = np.argsort(p_values)
    m = p_values.size
    passed = p_values[order] <= rate * np.arange(1, m + 1) / m
    rejected = np.zeros(m, dtype=bool)
    if passed.any():
        rejected[order[: np.flatnonzero(passed)[-1] + 1]] = True
    return rejected


def rope_wavelengths(inverse_frequencies: FloatArray) -> FloatArray:
    """Wavelengths of rotary embeddings, tokens, ascending and distinct: λ = 2π/ω.

    Plain rotary embeddings of base b turn pair i of d/2 by ω_i = b^(−2i/d) per token (Su et
    al., 2021); scaled ones (linear, YaRN, Llama 3) have other ω. Pairs that do not turn (ω = 0)
    have no wavelength.
    """
    turning = inverse_frequencies[inverse_frequencies > 0]
    wavelengths: FloatArray = np.unique(2 * np.pi / turning)
    return wavelengths


def nearest_wavelength(period: float, wavelengths: FloatArray) -> float | None:
    """The RoPE wavelength that a period agrees with, None if none is near."""
    if wavelengths.size == 0:
        return None
    nearest = float(wavelengths[np.argmin(np.abs(np.log(wavelengths / period)))])
    return nearest if abs(nearest / period - 1) <= NAME_TOLERANCE else None


def _periodogram(x: FloatArray) -> FloatArray:
    """|FFT|² scaled so that its sum over positive frequencies is the series' variance."""
    power: FloatArray = 2 * np.square(np.abs(np.fft.rfft(x, axis=-1))) / x.shape[-1] ** 2
    return power


def _red_noise_power(x: FloatArray, seed: int, surrogates: int) -> FloatArray:
    """Periodograms of AR(1) surrogates: [surrogates, F]."""
    from scipy.signal import lfilter

    phi = float(np.clip((x[1:] @ x[:-1]) / max(float(x @ x), 1e-300), -0.999, 0.999))
    generator = np.random.default_rng(seed)
    warm_up = 100
    noise = generator.normal(size=(surrogates, x.size + warm_up))
    red = lfilter([np.sqrt(1 - phi * phi)], [1.0, -phi], noise, axis=1)[:, warm_up:]
    return _periodogram(red * x.std())
