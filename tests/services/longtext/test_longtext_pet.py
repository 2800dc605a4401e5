"""The pet.* checks: what a record promises, on tiny models and on both shipped sets of gates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from so8tqc.config import LongTextConfig
from so8tqc.metrics.oscillation import Change
from so8tqc.records import Verdict
from so8tqc.rotations.options import RotationOptions
from so8tqc.rotations.read import read_rotations
from so8tqc.services.longtext.pet import changes_from_base, effect_check, looks
from so8tqc.services.longtext.service import longtext
from so8tqc.sources.hf import HFModel
from so8tqc.sources.inputs.builtin import DEMO_MODEL, resolve_model, resolve_rotations
from so8tqc.sources.inputs.texts import encode, load_texts, load_tokenizer
from so8tqc.sources.probe import Probe, probe

PROMISE = json.dumps({"kind": "l2", "strength": 0.5})


def changes(low: float, high: float) -> dict[str, Change]:
    middle = Change(1.0, 1.0 + (low + high) / 2, (low + high) / 2, (low, high))
    return {"energy": middle, "high_frequency": middle}


@pytest.mark.parametrize(
    ("interval", "record", "verdict", "reading"),
    [
        ((-0.09, -0.05), PROMISE, Verdict.PASS, "as after training with PET"),
        ((-0.02, -0.01), PROMISE, Verdict.FAIL, "as after training without PET"),
        ((-0.05, -0.01), PROMISE, Verdict.FAIL, "neither"),
        ((-0.09, -0.05), "none", Verdict.SKIP, "as after training with PET"),
        ((-0.02, -0.01), None, Verdict.SKIP, "as after training without PET"),
    ],
)
def test_what_is_judged(
    interval: tuple[float, float], record: str | None, verdict: Verdict, reading: str
) -> None:
    check = effect_check("text", changes(*interval), record)
    assert check.verdict is verdict
    assert reading in check.detail
    assert f"{100 * interval[0]:+.1f} … {100 * interval[1]:+.1f}" in check.detail


def test_one_of_two_that_stays_restless_fails() -> None:
    mixed = {
        "energy": changes(-0.09, -0.05)["energy"],
        "high_frequency": changes(-0.02, 0.01)["energy"],
    }
    check = effect_check("text", mixed, PROMISE)
    assert check.verdict is Verdict.FAIL
    assert check.value == 0.01
    assert "neither" in looks(mixed)


def test_a_record_without_the_effect_fails_the_stage(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    """Random gates whose header claims training with PET."""
    gates = make_gates(llama)
    tensors, header = load_file(gates), dict(read_rotations(gates, RotationOptions()).metadata)
    promising = {f"so8t.{key}": value for key, value in header.items()} | {"so8t.pet": PROMISE}
    save_file(tensors, gates, metadata=promising)
    record = longtext(
        LongTextConfig(
            model=llama,
            reference=llama,
            rotations=gates,
            out=tmp_path / "out",
            data=("builtin:longtext",),
            min_tokens=128,
            max_new_tokens=0,
            png=False,
            resamples=100,
        )
    )
    effects = [check for check in record.checks if check.id == "pet.effect"]
    assert len(effects) == 3
    assert {check.verdict for check in effects} == {Verdict.FAIL}
    assert json.loads(record.metrics["gates_pet"])["strength"] == 0.5


@pytest.mark.demo
def test_both_shipped_sets_are_told_apart_by_record_and_by_hidden_states() -> None:
    directory = resolve_model(DEMO_MODEL)
    model = HFModel.load(directory)
    texts = encode(load_texts(["builtin:longtext"]), load_tokenizer(directory), 2048)
    config = LongTextConfig(model=directory, out=Path("unused"))
    found: dict[str, list[tuple[Verdict, str]]] = {"pet": [], "nopet": []}
    for text in texts:
        base = probe(model, text.tokens)
        for name, seen in found.items():
            gates = read_rotations(
                resolve_rotations(f"builtin:smollm2-135m-{name}"), RotationOptions()
            )
            measured = changes_from_base(base, probe(model, text.tokens, gates), config)
            check = effect_check(text.id, measured, gates.metadata["pet"])
            print(check.detail)
            seen.append((check.verdict, looks(measured)))
    with_pet = "the hidden states look as after training with PET"
    assert set(found["pet"]) == {(Verdict.PASS, with_pet)}
    assert set(found["nopet"]) == {(Verdict.SKIP, with_pet.replace("with ", "without "))}


def test_a_layer_that_was_stirred_up_is_named() -> None:
    from so8tqc.services.longtext.pet import fidelity_checks

    sums = np.ones((4, 100, 3))
    stirred = sums.copy()
    stirred[2, :, 1:] *= 1.2
    quiet, loud = (Probe(None, s, None) for s in (sums, stirred))  # type: ignore[arg-type]
    assert [c.verdict for c in fidelity_checks("t", quiet, quiet)] == [Verdict.PASS] * 2
    for check in fidelity_checks("t", loud, quiet):
        assert check.verdict is Verdict.FAIL
        assert check.value == pytest.approx(0.2)
        assert "in layer 2" in check.detail
