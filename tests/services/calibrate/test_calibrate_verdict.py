"""A temperature that is known is found, used where it helps, and told where it does not."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from known_temperature import (
    OPTIONS,
    FakeSource,
    V,
    calibrate,
    check_of,
    sure_misses,
    world,
)

from so8tqc.config import CalibrateOptions
from so8tqc.errors import (
    DataError,
    InputError,
)
from so8tqc.records import Verdict
from so8tqc.services.calibrate.verdict import calibrate_source, temperature_checks
from so8tqc.sources.protocol import EncodedText
from so8tqc.sources.temperatures import frequent_tokens


def test_known_temperature_is_found_used_and_helps() -> None:
    known = world(1.7)
    calibration = calibrate(known)
    assert calibration.temperature == calibration.fit.temperature
    assert calibration.temperature == pytest.approx(1.7, abs=0.15)
    assert calibration.fit.ci95 is not None
    assert calibration.fit.ci95[0] < 1.7 < calibration.fit.ci95[1]
    assert calibration.significant
    for name in ("nll", "ece", "adaptive_ece", "brier"):
        assert calibration.used[name].better
    assert {c.verdict for c in temperature_checks(calibration)} == {Verdict.PASS}


def test_one_pass_whatever_the_number_of_temperatures() -> None:
    known = world(1.7)
    calibrate(known)
    assert known[0].passes == len(known[1])


def test_held_out_numbers_are_those_of_full_logits_of_held_out_texts() -> None:
    source, texts, split = world(1.7)
    calibration = calibrate((source, texts, split))
    nll = []
    for index in split.holdout:
        tokens = texts[index].tokens
        z = torch.cat(list(source.logits(tokens, 1000)))[:-1].double() / calibration.temperature
        logp = z.log_softmax(dim=1)
        nll.append(-logp[torch.arange(len(tokens) - 1), torch.from_numpy(tokens[1:])])
    assert calibration.used["nll"].after == pytest.approx(float(torch.cat(nll).mean()), abs=1e-5)


def test_a_gain_that_may_be_chance_is_not_used() -> None:
    calibration = calibrate(world(1.0))
    assert calibration.fit.temperature != 1.0
    assert not calibration.significant
    assert calibration.temperature == 1.0
    for name in ("nll", "ece", "brier"):
        check = check_of(calibration, name)
        assert (check.value, check.limit, check.verdict) == (0.0, 0.0, Verdict.PASS)
        assert "T = 1 is used" in check.detail


def test_a_fit_at_a_bound_is_not_used_though_it_helps() -> None:
    options = CalibrateOptions(resamples=300, bounds=(0.9, 1.2))
    calibration = calibrate(world(2.0), options)
    assert calibration.fit.at_bound
    assert calibration.fitted["nll"].better
    assert not calibration.significant
    assert calibration.temperature == 1.0


def test_a_temperature_that_worsens_ece_fails_its_check() -> None:
    calibration = calibrate(sure_misses())
    assert calibration.significant
    assert check_of(calibration, "nll").verdict is Verdict.PASS
    ece = check_of(calibration, "ece")
    assert ece.verdict is Verdict.FAIL
    assert ece.ci95 is not None
    assert ece.ci95[0] > 0


def test_the_ece_objective_refuses_what_nll_would_accept() -> None:
    options = CalibrateOptions(resamples=300, objective="ece")
    calibration = calibrate(sure_misses(), options)
    assert calibration.judged_by == "ece"
    assert check_of(calibration, "ece").verdict is Verdict.PASS


@pytest.mark.parametrize("objective", ["brier", "ece"])
def test_other_objectives_find_the_temperature(objective: str) -> None:
    options = CalibrateOptions.model_validate({"objective": objective, "resamples": 300})
    calibration = calibrate(world(1.7), options)
    assert calibration.judged_by == objective
    assert calibration.significant
    assert calibration.temperature == pytest.approx(1.7, abs=0.25)


def test_entropy_matches_the_reference() -> None:
    source, texts, split = world(1.5)
    reference = FakeSource({key: z / np.float32(1.5) for key, z in source._logits.items()})
    options = CalibrateOptions(resamples=300, objective="entropy")
    calibration = calibrate_source(source, texts, split, options, reference=reference)
    assert calibration.fit.temperature == pytest.approx(1.5, abs=1e-3)
    assert calibration.judged_by == "nll"
    assert calibration.reference is not None
    assert calibration.reference.at(1.0).entropy.mean() == pytest.approx(
        calibration.holdout_table.at(1.5).entropy.mean(), abs=1e-3
    )


def test_confidence_variance_is_degenerate_and_not_used() -> None:
    options = CalibrateOptions(resamples=300, objective="confidence-variance")
    calibration = calibrate(world(1.7), options)
    assert calibration.fit.at_bound
    assert calibration.temperature == 1.0


def test_another_vocabulary_is_refused() -> None:
    source, texts, split = world(1.5)
    with pytest.raises(InputError, match="cannot be compared"):
        calibrate_source(source, texts, split, OPTIONS, reference=FakeSource({}, V + 1))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_logits_name_text_and_position(value: float) -> None:
    source, texts, split = world(1.5, tokens=300)
    source._logits[texts[3].tokens.tobytes()][201, 5] = value
    with pytest.raises(DataError, match="t3: fake yields non-finite logits at position 201"):
        calibrate_source(source, texts, split, OPTIONS)


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    source, texts, split = world(1.5)
    texts[2].tokens[7] = V
    with pytest.raises(DataError, match=r"t2: token 40 at position 7 .* tokenizer"):
        calibrate_source(source, texts, split, OPTIONS)


def test_every_objective_is_reported_from_the_same_pass() -> None:
    source, texts, split = world(1.7)
    reference = FakeSource({key: z / np.float32(1.5) for key, z in source._logits.items()})
    calibration = calibrate_source(source, texts, split, OPTIONS, reference=reference)
    assert source.passes == len(texts)
    fits = calibration.objectives
    assert list(fits) == ["nll", "brier", "ece", "entropy", "confidence-variance"]
    assert fits["confidence-variance"].at_bound
    assert fits["entropy"].temperature == pytest.approx(1.5, abs=1e-3)
    assert all(fit.converged for fit in fits.values())
    for name, fit in fits.items():
        alone = CalibrateOptions.model_validate({"resamples": 300, "objective": name})
        again = calibrate_source(source, texts, split, alone, reference=reference)
        assert again.fit.temperature == fit.temperature
    without = calibrate((source, texts, split))
    assert "entropy" not in without.objectives


def test_classes_are_the_most_frequent_next_tokens() -> None:
    texts = [
        EncodedText("a", np.array([9, 3, 3, 5, 5, 7])),
        EncodedText("b", np.array([9, 5, 1, 7])),
    ]
    assert frequent_tokens(texts, 3).tolist() == [5, 3, 7]
    assert frequent_tokens(texts, 99).tolist() == [5, 3, 7, 1]


def test_classwise_ece_is_that_of_full_logits() -> None:
    source, texts, split = world(1.7)
    calibration = calibrate((source, texts, split))
    classes = frequent_tokens(texts, OPTIONS.classes).tolist()
    rows, following = [], []
    for index in split.holdout:
        tokens = texts[index].tokens
        z = torch.cat(list(source.logits(tokens, 1000)))[:-1].double() / calibration.temperature
        rows.append(z.softmax(dim=1).numpy())
        following.append(tokens[1:])
    p, y = np.concatenate(rows), np.concatenate(following)
    total, edges = 0.0, np.linspace(0, 1, 16)
    for c in classes:
        for low, high in pairwise(edges):
            inside = (p[:, c] > low) & (p[:, c] <= high)
            if inside.any():
                total += inside.mean() * abs((y[inside] == c).mean() - p[inside, c].mean())
    after = calibration.used["classwise_ece"].after
    assert after == pytest.approx(total / len(classes), abs=2e-4)
