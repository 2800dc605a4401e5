"""What ships of a calibration: how far each measure is from the reference, before and after."""

from __future__ import annotations

import numpy as np
from known_temperature import (
    OPTIONS,
    FakeSource,
    world,
)

from so8tqc.services.calibrate.summary import temperature_summary
from so8tqc.services.calibrate.verdict import calibrate_source

MEASURES = {"nll", "ece", "adaptive_ece", "classwise_ece", "brier", "sharpness"}


def test_back_where_the_original_was() -> None:
    """The quantized model is the original, sharpened by 1.7; the fit undoes it."""
    source, texts, split = world(1.7)
    reference = FakeSource({key: z / np.float32(1.7) for key, z in source._logits.items()})
    calibration = calibrate_source(source, texts, split, OPTIONS, reference=reference)
    against = temperature_summary(calibration, OPTIONS)["against_reference"]
    assert isinstance(against, dict)
    assert set(against) == MEASURES - {"sharpness"}
    for name in ("nll", "ece", "brier"):
        row = against[name]
        assert row["before"]["difference"] > 0.01
        assert abs(row["after"]["difference"]) < row["before"]["difference"] / 4
        assert row["back"] is True


def test_what_quantization_destroyed_does_not_come_back() -> None:
    source, texts, split = world(1.7)
    generator = np.random.default_rng(9)
    true = {key: z / np.float32(1.7) for key, z in source._logits.items()}
    noisy = {
        key: (z + 0.8 * generator.normal(size=z.shape)).astype(np.float32)
        for key, z in true.items()
    }
    calibration = calibrate_source(
        FakeSource(noisy), texts, split, OPTIONS, reference=FakeSource(true)
    )
    assert calibration.significant
    against = temperature_summary(calibration, OPTIONS)["against_reference"]
    assert isinstance(against, dict)
    assert against["nll"]["back"] is False
    assert against["brier"]["back"] is False
