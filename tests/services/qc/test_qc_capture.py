"""A capture as reference: what is said of it, and whether a tokenizer is the recorded one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from so8tqc.metrics.columns import COLUMNS
from so8tqc.metrics.divergence import TokenTable
from so8tqc.record_kinds.qc import Recorded as OnRecord
from so8tqc.records import Verdict
from so8tqc.services.qc.capture import capture_metrics, capture_notices, vocabulary_checks
from so8tqc.services.qc.judging import EFFECT_FACTOR, SMALLEST_EFFECT
from so8tqc.sources.capture import vocabulary_digest
from so8tqc.sources.inputs.texts import load_tokenizer


class Recorded:
    """The parts of a capture that are looked at."""

    texts = ("a", "b")
    tokens = 77
    dtype = torch.float16
    source = "the training"

    def __init__(self, vocabulary: str = "") -> None:
        self.vocabulary_sha256 = vocabulary


def recorded(vocabulary: str = "") -> Any:
    return Recorded(vocabulary)


def table(kl: float) -> TokenTable:
    columns = {name: np.full(6, kl) for name in COLUMNS}
    zero = np.zeros(6, np.int32)
    return TokenTable(columns, zero, zero, 9, ("t",))


def test_the_tokenizer_must_have_the_recorded_vocabulary(llama: Path, tmp_path: Path) -> None:
    digest = vocabulary_digest(load_tokenizer(llama))
    (right,) = vocabulary_checks(recorded(digest), {"baked": llama})
    assert (right.subject, right.verdict) == ("baked", Verdict.PASS)
    (wrong,) = vocabulary_checks(recorded("0" * 64), {"baked": llama})
    assert wrong.verdict is Verdict.FAIL
    (unsaid,) = vocabulary_checks(recorded(), {"baked": llama})
    (without,) = vocabulary_checks(recorded(digest), {"baked": tmp_path})
    assert unsaid.verdict is without.verdict is Verdict.SKIP
    assert unsaid.detail != without.detail


def test_what_was_recorded_is_on_record() -> None:
    found = capture_metrics(recorded(), None)
    assert found == OnRecord(texts=2, tokens=77, dtype="float16", source="the training")
    gated = capture_metrics(recorded(), table(0.25)).gated
    assert gated is not None
    assert gated.kl_mean == 0.25


@pytest.mark.parametrize(
    ("distance", "floor", "told"),
    [
        (SMALLEST_EFFECT, None, False),
        (2 * SMALLEST_EFFECT, None, True),
        (EFFECT_FACTOR * 0.01, 0.01, False),
        (1.01 * EFFECT_FACTOR * 0.01, 0.01, True),
    ],
)
def test_other_rotations_than_recorded_are_told(
    distance: float, floor: float | None, told: bool
) -> None:
    notices = capture_notices(table(distance), None if floor is None else table(floor))
    assert bool(notices) is told
    if told:
        assert f"{distance:.3g} nats from the capture" in notices[0]


def test_without_base_and_rotations_the_missing_floor_is_told() -> None:
    (notice,) = capture_notices(None, None)
    assert "no noise floor was measured" in notice
