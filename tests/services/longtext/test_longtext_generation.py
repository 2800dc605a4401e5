"""Free-running text: what is drawn, and what the repetition checks make of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from so8tqc.records import Verdict
from so8tqc.services.longtext.generation import repetition_checks
from so8tqc.services.longtext.judging import Case
from so8tqc.sources.generate import sampled
from so8tqc.sources.probe import Probe
from so8tqc.sources.protocol import EncodedText

FRESH = list(range(200))
LOOP = [1, 2, 3, 4] * 50


def case(index: int, **generated: list[int]) -> Case:
    made = Case(EncodedText(f"t{index}", np.arange(300)), generated=dict(generated))
    made.reference = Probe(torch.empty(0), np.empty((0, 0, 3)), None)
    return made


def test_sampling_draws_from_the_softmax() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -torch.inf, -1.0])
    pick = sampled(0)
    counts = np.bincount([pick(logits) for _ in range(4000)], minlength=5)
    assert counts[3] == 0
    expected = logits.double().softmax(0).numpy()[[0, 1, 2, 4]] * 4000
    assert scipy.stats.chisquare(counts[[0, 1, 2, 4]], expected).pvalue > 0.001


def test_equal_seeds_draw_equal_tokens_from_nearly_equal_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two, other = sampled(3), sampled(3), sampled(4)
    agreed, others = 0, 0
    for _ in range(200):
        z = torch.randn(500, generator=generator) * 2
        token = one(z)
        agreed += token == two(z + 1e-3 * torch.randn(500, generator=generator))
        others += token == other(z)
    assert agreed >= 195
    assert others < 100


def test_a_candidate_that_loops_where_the_reference_does_not_fails() -> None:
    cases = [case(0, candidate=LOOP, reference=FRESH), case(1, candidate=LOOP, reference=FRESH)]
    checks = {check.id: check for check in repetition_checks(cases)}
    assert {check.verdict for check in checks.values()} == {Verdict.FAIL}
    assert checks["oscillation.loops"].value == 1.0
    assert checks["oscillation.repetition"].value == pytest.approx(193 / 197)
    assert checks["oscillation.compression"].value > math.log(2)


def test_what_the_reference_does_too_is_no_fault() -> None:
    cases = [
        case(0, candidate=LOOP, reference=LOOP, candidate_sampled=FRESH, reference_sampled=FRESH)
    ]
    for check in repetition_checks(cases):
        assert check.verdict is Verdict.PASS
        assert check.value == 0.0
        assert "2 generated texts" in check.detail


def test_one_loop_more_in_four_texts_may_be_chance() -> None:
    cases = [
        case(0, candidate=LOOP, reference=FRESH, candidate_sampled=FRESH, reference_sampled=FRESH),
        case(1, candidate=FRESH, reference=FRESH, candidate_sampled=FRESH, reference_sampled=FRESH),
    ]
    (loops,) = [check for check in repetition_checks(cases) if check.id == "oscillation.loops"]
    assert (loops.value, loops.verdict) == (0.25, Verdict.PASS)


def test_texts_that_end_at_once_are_not_judged() -> None:
    checks = repetition_checks([case(0, candidate=[2], reference=FRESH)])
    assert {check.verdict for check in checks} == {Verdict.SKIP}
    assert all("ends before 32 tokens, the first after 1" in check.detail for check in checks)
    (nothing, *_) = repetition_checks([case(0)])
    assert nothing.detail == "nothing was generated"
    alone = case(0, candidate=FRESH)
    alone.reference = None
    assert "no reference" in repetition_checks([alone])[0].detail
