"""Our numbers are netcal's: ECE, and the temperature that the same stored logits give.

netcal comes with the extra ``peers`` (``nox -s peers``); without it these tests are skipped.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from so8tqc.metrics.calibration import expected_calibration_error
from so8tqc.metrics.temperature.fit import fit_temperature
from so8tqc.metrics.temperature.measures import NLL
from so8tqc.metrics.temperature.table import knots, partition_rows, temperature_table

metrics = pytest.importorskip("netcal.metrics")
scaling = pytest.importorskip("netcal.scaling")

BOUNDS = (0.5, 3.0)


def _netcals(z: np.ndarray, y: np.ndarray) -> float:
    """netcal's temperature; it takes probabilities, and needs float64 to move at all."""
    model = scaling.TemperatureScaling()
    model.fit(softmax(z.astype(np.float64), axis=1), y)
    return float(1.0 / np.asarray(model.temperature).ravel()[0])


def _ours(z: np.ndarray, y: np.ndarray) -> float:
    top, each = z.argmax(axis=1), np.arange(len(y))
    table = temperature_table(
        partition_rows(z, knots(BOUNDS))[0],
        z[each, y].astype(np.float64) - z[each, top],
        top == y,
        np.zeros(len(y), dtype=np.intp),
        ("all",),
        BOUNDS,
    )
    return fit_temperature(table, NLL, resamples=100, seed=0).temperature


@pytest.mark.parametrize("seed", range(3))
def test_ece_and_its_bins_are_netcals(seed: int) -> None:
    generator = np.random.default_rng(seed)
    p = softmax(generator.normal(size=(4000, 6)) * 2, axis=1)
    y = generator.integers(0, 6, 4000)
    ours = expected_calibration_error(p.max(axis=1), p.argmax(axis=1) == y, 15)
    assert ours == pytest.approx(metrics.ECE(15).measure(p, y), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3, 2.2])
def test_the_temperature_is_netcals(temperature: float) -> None:
    generator = np.random.default_rng(7)
    z = (generator.normal(size=(2000, 50)) * 2.5).astype(np.float32)
    y = (z / temperature + generator.gumbel(size=z.shape)).argmax(axis=1)
    ours = _ours(z, y)
    assert ours == pytest.approx(_netcals(z, y), abs=1e-3)
    assert ours == pytest.approx(temperature, rel=0.1)


@pytest.mark.demo
@pytest.mark.llama
def test_the_temperature_is_netcals_on_the_demo_models_logits() -> None:
    from so8tqc.sources.gguf import GGUFSource
    from so8tqc.sources.inputs.builtin import DEMO_MODEL, demo_gguf, resolve_model
    from so8tqc.sources.inputs.texts import encode, load_texts, load_tokenizer

    tokenizer = load_tokenizer(resolve_model(DEMO_MODEL))
    texts = encode(load_texts(["builtin:validation"]), tokenizer, 33)
    source = GGUFSource(demo_gguf(), "demo")
    z = np.concatenate(
        [block.numpy().copy() for t in texts for block in source.logits(t.tokens[:-1], 32)]
    )
    source.close()
    y = np.concatenate([text.tokens[1:] for text in texts])
    assert z.shape == (800, 49_152)
    ours = _ours(z, y)
    assert abs(ours - 1.0) > 0.02  # else a fit that never moves would agree
    assert ours == pytest.approx(_netcals(z, y), abs=1e-3)
