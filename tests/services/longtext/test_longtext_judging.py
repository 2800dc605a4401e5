"""Checks of one long text from measurements written by hand: which fail, and which are skipped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from so8tqc.config import LongTextConfig
from so8tqc.metrics.columns import COLUMNS
from so8tqc.metrics.divergence import TokenTable
from so8tqc.metrics.spectra import Spectrum
from so8tqc.records import Check, Verdict
from so8tqc.services.longtext.judging import (
    ATTENTION_LIMIT_NATS,
    COMPARING_CHECKS,
    DRIFT_LIMIT,
    LAYER0_LIMIT_NATS,
    Case,
    case_checks,
    effect_checks,
)
from so8tqc.sources.probe import Probe
from so8tqc.sources.protocol import EncodedText

TOKENS, LAYERS, HEADS = 400, 3, 2
CONFIG = LongTextConfig(model=Path("m"), out=Path("o"), resamples=200)
MAKE = np.random.default_rng(0)
ENTROPY = MAKE.uniform(1, 2, size=(LAYERS, HEADS, TOKENS)).astype(np.float32)
SUMS = MAKE.uniform(1, 2, size=(LAYERS, TOKENS - 4, 3))
LOGITS = MAKE.normal(size=TOKENS)


def probe(entropy: np.ndarray | None = ENTROPY) -> Probe:
    return Probe(torch.zeros(TOKENS, 4), SUMS, entropy)


def spectrum(power: float = 0.1, *, significant: bool = False) -> Spectrum:
    one = np.ones(2)
    return Spectrum(one * 7, one * power, one * 0.01, np.full(2, significant))


def table(kl: np.ndarray | None = None, candidate: np.ndarray = LOGITS) -> TokenTable:
    columns = {name: np.full(TOKENS, 0.5) for name in COLUMNS}
    columns["kl"] = np.full(TOKENS, 1e-3) if kl is None else kl
    columns |= {"max_logit_reference": LOGITS, "max_logit_candidate": candidate}
    zero = np.zeros(TOKENS, np.int32)
    return TokenTable(columns, zero, np.arange(TOKENS, dtype=np.int32), 9, ("t",))


def case(**fields: object) -> Case:
    plain = {
        "candidate": probe(),
        "reference": probe(),
        "table": table(),
        "spectra": {"candidate": spectrum(), "reference": spectrum()},
    }
    text = EncodedText("t", np.zeros(TOKENS, np.int64))
    return Case(text, **{**plain, **fields})  # type: ignore[arg-type]


def checks(one: Case, *, rope: bool = True) -> dict[str, Check]:
    return {check.id: check for check in case_checks(one, CONFIG, rope=rope)}


def failed(one: Case) -> set[str]:
    return {name for name, check in checks(one).items() if check.verdict is Verdict.FAIL}


def test_a_model_against_itself_passes_every_check() -> None:
    found = checks(case())
    assert set(found) == set(COMPARING_CHECKS)
    assert {check.verdict for check in found.values()} == {Verdict.PASS}


def moved(layer: int, by: float) -> np.ndarray:
    other = ENTROPY.copy()
    other[layer] += by
    return other


@pytest.mark.parametrize(
    ("layer", "by", "wanted"),
    [
        (0, 2 * LAYER0_LIMIT_NATS, {"phase.layer0"}),
        (0, 0.5 * LAYER0_LIMIT_NATS, set()),
        (2, 2 * ATTENTION_LIMIT_NATS, {"phase.attention"}),
        (2, 0.5 * ATTENTION_LIMIT_NATS, set()),
        (0, 2 * ATTENTION_LIMIT_NATS, {"phase.layer0", "phase.attention"}),
    ],
)
def test_attention_is_judged_layer_by_layer(layer: int, by: float, wanted: set[str]) -> None:
    one = case(candidate=probe(moved(layer, by)))
    assert failed(one) == wanted
    if "phase.attention" in wanted:
        assert f"in layer {layer}" in checks(one)["phase.attention"].detail


def test_rotations_that_change_layer_0_itself_leave_no_self_test() -> None:
    one = case(base=probe(moved(0, 0.1)), candidate=probe(moved(0, 0.1)))
    assert checks(one)["phase.layer0"].verdict is Verdict.SKIP


@pytest.mark.parametrize(
    ("ours", "theirs", "fails"),
    [
        (spectrum(0.3, significant=True), spectrum(0.1), True),
        (spectrum(0.3), spectrum(0.1), False),
        (spectrum(0.15, significant=True), spectrum(0.1, significant=True), False),
    ],
)
def test_a_dip_needs_significance_and_twice_the_power(
    ours: Spectrum, theirs: Spectrum, fails: bool
) -> None:
    one = case(spectra={"candidate": ours, "reference": theirs})
    assert ("phase.dips" in failed(one)) is fails
    assert checks(one, rope=False)["phase.dips"].verdict is Verdict.SKIP


def test_an_error_that_grows_along_the_text_fails() -> None:
    position = np.arange(TOKENS) / 1000
    noise = 0.05 * np.random.default_rng(1).normal(size=TOKENS)
    for slope, fails in ((0.0, False), (0.5 * DRIFT_LIMIT, False), (3 * DRIFT_LIMIT, True)):
        one = case(table=table(np.exp(-7 + slope * position + noise)))
        assert ("phase.position" in failed(one)) is fails
        assert f"{slope:+.1f}"[:2] in checks(one)["phase.position"].detail or slope == 0


def test_logits_that_alternate_fail_and_smooth_ones_do_not() -> None:
    restless = LOGITS + 2 * (-1.0) ** np.arange(TOKENS)
    found = failed(case(table=table(candidate=restless)))
    assert {"oscillation.index", "oscillation.von_neumann", "oscillation.high_frequency"} == found
    smooth = np.convolve(LOGITS, np.ones(4) / 4, mode="same")
    assert failed(case(table=table(candidate=smooth))) == set()


def test_what_cannot_be_looked_at_is_a_skip_with_a_reason() -> None:
    def skips(one: Case) -> set[str]:
        return {name for name, check in checks(one).items() if check.verdict is Verdict.SKIP}

    assert skips(case(reference=None)) == set(COMPARING_CHECKS)
    attention = {"phase.layer0", "phase.attention", "phase.dips"}
    assert skips(case(candidate=None)) == attention | {"pet.energy", "pet.high_frequency"}
    assert skips(case(candidate=probe(None))) == attention
    assert skips(case(reference=probe(None))) == attention
    (check,) = effect_checks([case()], None)
    assert (check.id, check.verdict) == ("pet.effect", Verdict.SKIP)
